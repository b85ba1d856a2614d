"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.runs.commands import copy_data


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: a second thread would only wait for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of SST-2, MRPC and STS-B."""
    return copy_data(data_dir, tmp_path_factory.mktemp("data"))

"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.commands import copy_data


@pytest.fixture(scope="session")
def small_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of SST-2, MRPC and STS-B."""
    return copy_data(data_dir, tmp_path_factory.mktemp("data"))

"""Shared fixtures: where the real data lies, quiet libraries, one thread per test process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runs.killer import Killer

gc.disable()  # until the first test begins: a quarter of what all imports take; see `collect_seldom`

# Before the libraries that read it: no import above loads one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more would be processes that import torch anew

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long. Tests of killed commands come first: one process then starts the program they share."""
    if not config.getoption("long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items.sort(key=lambda item: "killer" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Take what earlier modules have imported and built out of the garbage collector's sight; see ``once.py``."""
    from tests.once import collect_seldom

    collect_seldom()


@pytest.fixture(scope="session", autouse=True)
def _worked_out_once() -> Iterator[None]:
    """What thousands of runs work out alike is worked out once, see ``once.py``."""
    from tests.once import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch.setattr)
        yield


@pytest.fixture(scope="session")
def killer() -> Iterator[Killer]:
    """Commands in forked processes; see ``runs/killer.py``."""
    from tests.runs.killer import Killer

    made = Killer()
    with made.until_done():
        yield made


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real benchmark data (``sst2/train.jsonl``, ...), or a loud skip."""
    folder = Path(os.environ.get("WEIGHTLORA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"NO BENCHMARK DATA: {folder} does not exist; set WEIGHTLORA_DATA to a folder of JSONL tasks")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the pretrained SmolLM2-135M, or a loud skip. It is converted once for all, in the user's cache."""
    from weightlora.errors import ConfigError
    from weightlora.tasks.smollm2 import smollm2_folder

    try:
        return smollm2_folder()
    except ConfigError as error:
        pytest.skip(f"NO PRETRAINED LANGUAGE MODEL: {error}")

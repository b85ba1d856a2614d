"""Software that takes what this package hands over, installed once for all into the user's cache, or a loud skip."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from tests.forks import RUN

from weightlora.files import new_folder
from weightlora.tasks.smollm2 import cache_folder

SECONDS = 240


def python_packages(name: str, *pins: str) -> Path:
    """A folder for ``PYTHONPATH`` with exactly these packages; what they need beside, the environment must have."""
    # Python compiles the few modules that are imported: pip would compile all, which takes as long as the rest.
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-compile", "--target", "."]
    return _installed(name, [sys.implementation.cache_tag, *pins], [sys.executable, *pip, *pins])


def node_packages(name: str, *pins: str) -> Path:
    """A folder whose ``node_modules`` hold these packages, nothing optional, and no script of theirs was run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip(f"NO {name.upper()}: node and npm are not installed here")
    npm = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--no-save"]
    return _installed(name, pins, [*npm, *pins])


def _installed(name: str, of: Sequence[str], command: Sequence[str]) -> Path:
    """What a command installs into an empty folder, found again by what it is `of`, from any checkout."""
    mark = hashlib.sha256("\n".join(of).encode()).hexdigest()[:12]
    folder = cache_folder() / "tests" / f"{name}-{mark}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            with new_folder(folder) as made:
                try:
                    done = subprocess.run(
                        command, cwd=made, capture_output=True, text=True, timeout=SECONDS, check=False
                    )
                except (OSError, subprocess.TimeoutExpired) as error:
                    pytest.skip(f"NO {name.upper()}: {error}")
                if done.returncode:
                    lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
                    pytest.skip(f"NO {name.upper()}: it cannot be installed here ({lines[-1]})")
    return folder


def run_python(script: Path, packages: Path, *words: str, **settings: str) -> str:
    """What a script prints that runs with such packages in front of the environment's, on one thread, offline."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(script), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={
            **os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1", **settings,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

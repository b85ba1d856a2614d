"""Accelerate collects garbage at the start of every run; what was imported need not be looked through each time."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports() -> None:
    gc.collect()
    gc.freeze()

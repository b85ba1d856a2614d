"""Several processes in one run directory, as torchrun or accelerate launch starts them: the main one writes."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes the launcher started for this run.

    >>> launched()
    1
    """
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and int(size) > 0 else 1


def follows() -> int:
    """The number of this process among those of its run; 0: the main one, which locks, writes and reports.

    >>> follows()
    0
    """
    rank = os.environ.get("RANK", "0")
    return int(rank) if launched() > 1 and rank.isdigit() else 0

"""What is worth saying about data, each thing once: the rows of one file are read by many runs."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("weightlora")


@functools.lru_cache(maxsize=1024)
def tell_once(level: int, line: str) -> None:
    """Log a line, unless this process has logged it before."""
    log.log(level, "%s", line)

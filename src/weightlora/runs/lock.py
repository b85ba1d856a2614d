"""One process at a time works in a run directory. The lock dies with its process, so a killed run is free at once."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from weightlora.errors import BusyError

INSIDE = ".lock"


def lock_file(folder: Path) -> Path:
    """Where a directory's lock lies: beside it, so that it outlives an overwrite; inside where only that is writable.

    >>> lock_file(Path("/tmp/runs-of-nobody/sst2")).name
    '.sst2.lock'
    """
    folder = folder.resolve()
    beside = folder.parent / f".{folder.name}.lock"
    mounted = folder.is_dir() and not beside.exists() and not os.access(folder.parent, os.W_OK)
    return folder / INSIDE if mounted else beside


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory against other processes; within one thread it may be held again.

    Args:
        folder: the directory; it need not exist.
        wait: until another process is done, instead of an error.

    Raises:
        BusyError: another process is at work there; nothing was touched.
    """
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path), is_singleton=True)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        if not path.exists():  # not held: it could not be made
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise BusyError(
            f"another process is at work in {folder}; wait for it, stop it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_busy(folder: Path) -> None:
    """Raise BusyError if another process holds the directory; leaves no trace if nobody ever did."""
    if lock_file(folder).exists():
        with alone(folder):
            pass

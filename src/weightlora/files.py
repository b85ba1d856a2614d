"""Files that are either whole or not there: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure it is removed.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with new_file(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def why_not_written(path: Path) -> str | None:
    """Say why no file can be written there; None: nothing is in the way.

    >>> why_not_written(Path(tempfile.gettempdir())), why_not_written(Path("new/folder/a.txt"))
    ('it is a folder', None)
    """
    if path.is_dir():
        return "it is a folder"
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        return f"{above} is a file"
    return None if os.access(above, os.W_OK) else f"{above} may not be written"


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that holds an object; None where it is none, or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there is no space for a file; libraries say it in their own words.

    >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device")), disk_is_full(FileNotFoundError("a"))
    (True, False)
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")
    return any(word in str(error) for word in words)


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed processes left half-written: temporary files and folders of `names` (patterns allowed).

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / ".a.txt.k3_x9qwe").write_text("ha"), (folder / ".a.mine").write_text("not a temporary name")
    >>> sweep(folder, "a.txt", "a")
    >>> [path.name for path in folder.iterdir()]
    ['.a.mine']
    """
    for left in leftovers(folder, *names):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def leftovers(folder: Path, *names: str) -> list[Path]:
    """The temporary files and folders of `names` that killed processes left in `folder`."""
    patterns = [f".{name}{old}.{'[a-z0-9_]' * 8}" for name in names for old in ("", ".old")]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

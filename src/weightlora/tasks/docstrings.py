"""A real task that every machine already has: tell the topic of a docstring of Python's own standard library."""

from __future__ import annotations

import ast
import functools
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks.examples import Examples

MIN_CHARACTERS = 20
MAX_CHARACTERS = 1000
VALIDATION_PERCENT = 15
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})

# Topic -> top-level modules and packages. Names that a Python version lacks are simply not found. Left out: what some
# distributions ship apart (tkinter, idlelib, distutils, lib2to3) and what says little (encodings, __future__).
TOPICS: dict[str, str] = {
    "text and data formats": (
        "_markupbase base64 codecs configparser csv difflib email gettext html json locale mailbox mailcap mimetypes"
        " netrc plistlib pprint quopri re reprlib shlex sre_compile sre_parse string stringprep textwrap tomllib uu"
        " xdrlib xml"
    ),
    "networking": (
        "cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib uuid"
        " webbrowser wsgiref xmlrpc"
    ),
    "concurrency and processes": (
        "_threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing pty queue sched selectors"
        " signal subprocess threading"
    ),
    "files and archives": (
        "_compression _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io lzma ntpath nturl2path os"
        " pathlib posixpath shelve shutil sqlite3 stat tarfile tempfile zipapp zipfile"
    ),
    "numbers, dates and containers": (
        "_collections_abc _pydatetime _pydecimal _strptime bisect calendar collections colorsys copy datetime decimal"
        " enum fractions functools graphlib hashlib heapq hmac numbers operator random secrets statistics types"
        " weakref zoneinfo"
    ),
    "language and imports": (
        "_py_abc abc ast code codeop compileall contextlib copyreg ctypes dataclasses dis ensurepip imp importlib"
        " inspect keyword modulefinder opcode pickle pickletools pkgutil platform py_compile pyclbr runpy site symtable"
        " sysconfig token tokenize typing venv zipimport"
    ),
    "testing and tools": (
        "_pyrepl argparse bdb cProfile cgitb cmd doctest getopt linecache logging optparse pdb profile pstats pydoc"
        " rlcompleter tabnanny timeit trace traceback tracemalloc unittest warnings"
    ),
}


def load_docstrings(root: Path | None = None) -> tuple[Examples, Examples, tuple[str, ...]]:
    """Read the docstrings of the standard library's modules, classes and functions, labelled by topic.

    The files are parsed, never imported. Doctest blocks and indentation are removed, texts are cut to
    ``MAX_CHARACTERS``, and a text that occurs twice is kept once, where it comes first. A text goes to validation by
    the CRC-32 of its qualified name, so the split is the same on every machine with the same Python.

    Args:
        root: the folder of the standard library; None for the running Python's own.

    Returns:
        Training examples, validation examples (about 15 %), topic names in label order.

    Raises:
        DataError: the folder has no such sources, as in a frozen or zipped Python.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = tuple(TOPICS)
    texts: tuple[list[str], list[str]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for qualified, text, label in _collect(folder):
        side = int(_hash(qualified) % 100 < VALIDATION_PERCENT)
        texts[side].append(text)
        labels[side].append(label)
    missing = [name for number, name in enumerate(names) if not all(number in side for side in labels)]
    if missing:
        raise DataError(
            f"{folder}: too few Python sources of the standard library (none on {', '.join(missing)});"
            " use a Python installed with its sources, or another task"
        )
    train, validation = (Examples(texts={"text": texts[side]}, labels=labels[side]) for side in (0, 1))
    return train, validation, names


@functools.cache
def _collect(folder: Path) -> tuple[tuple[str, str, int], ...]:
    """Every (qualified name, text, topic number), in the order of their hashes, so that topics are well mixed."""
    found: dict[str, tuple[str, str, int]] = {}
    for label, modules in enumerate(TOPICS.values()):
        for module in modules.split():
            for path in _sources(folder, module):
                for qualified, docstring in _docstrings(folder, path):
                    text = clean(docstring)
                    if len(text) >= MIN_CHARACTERS:
                        found.setdefault(text, (qualified, text, label))
    return tuple(sorted(found.values(), key=lambda row: (_hash(row[0]), *row)))


def _hash(qualified: str) -> int:
    return zlib.crc32(qualified.encode())


def _sources(folder: Path, module: str) -> list[Path]:
    """The files of a top-level module or package, without its tests."""
    paths = [folder / f"{module}.py", *(folder / module).rglob("*.py")]
    return sorted(path for path in paths if path.is_file() and not SKIPPED_FOLDERS & {*path.relative_to(folder).parts})


def _docstrings(folder: Path, path: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like in files that are not ours
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return
    module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
    yield from _walk(tree, module)


def _walk(node: ast.AST, qualified: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            yield qualified, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{qualified}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _walk(child, qualified)


def clean(docstring: str) -> str:
    """Return a docstring without indentation, doctest blocks and what lies beyond ``MAX_CHARACTERS``.

    A doctest block runs from a ``>>>`` prompt to the next blank line.

    >>> clean("Add.\\n\\n    >>> 1 + 1\\n    2\\n\\n    Done.\\n")
    'Add.\\n\\nDone.'
    """
    kept: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring).split("\n"):
        inside = (inside and bool(line.strip())) or line.lstrip().startswith(">>>")
        if not inside and (line.strip() or (kept and kept[-1].strip())):
            kept.append(line.rstrip())
    return "\n".join(kept).strip()[:MAX_CHARACTERS].rstrip()

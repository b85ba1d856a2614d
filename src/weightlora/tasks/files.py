"""Tables of rows from JSONL, CSV and TSV files, and every way in which they can be wrong, said with file and line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks.delimited import DELIMITERS, delimited_rows
from weightlora.tasks.spec import JSONL


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one file, each with the line it starts on."""

    path: Path
    rows: list[dict[str, object]]
    lines: list[int]

    def error(self, row: int, problem: str) -> DataError:
        """Return the error for ``row`` in the form ``file:line: problem``."""
        return DataError(f"{self.path}:{self.lines[row]}: {problem}")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Table:
        """Return the given rows, in the given order."""
        return Table(path=self.path, rows=[self.rows[row] for row in rows], lines=[self.lines[row] for row in rows])

    def column(self, name: str, remedy: str) -> list[object]:
        """Return one column; a row without it is an error that lists what the row has, then the remedy."""
        values = []
        for number, row in enumerate(self.rows):
            if name not in row:
                raise self.error(number, f"no column {name!r}; there are: {', '.join(map(repr, row))}; {remedy}")
            values.append(row[name])
        return values


def read_table(path: Path) -> Table:
    """Read a JSONL (``.jsonl``, ``.json``, ``.ndjson``) or delimited (``.csv``, ``.tsv``, with header) file in UTF-8.

    Lines end at ``\\n`` only, so U+2028 and its like inside a JSON string are text.

    Args:
        path: the file.

    Returns:
        Its rows; blank lines are skipped. Delimiters and quotes: see `delimited_rows`.

    Raises:
        DataError: missing or empty file, unknown suffix, broken line, a line that is not an object, a key that occurs
            twice, wrong number of cells; the message names file, line and remedy.
    """
    suffix = path.suffix.lower()
    if suffix not in (*JSONL, *DELIMITERS):
        known = ", ".join((*JSONL, *DELIMITERS))
        raise DataError(f"{path}: the suffix {suffix!r} is not one of {known}; rename or convert the file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None
    parse = _jsonl_rows(path, text) if suffix in JSONL else delimited_rows(path, text, DELIMITERS[suffix])
    rows, lines = [], []
    for line, row in parse:
        rows.append(row)
        lines.append(line)
    if not rows:
        raise DataError(f"{path}: the file is empty; give it at least one row of data")
    return Table(path=path, rows=rows, lines=lines)


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: broken JSON ({error}); write one JSON object per line") from None
        if not isinstance(row, dict):
            kind = "a list" if isinstance(row, list) else f"the value {line.strip()[:40]}"
            raise DataError(f"{path}:{number}: {kind}, not an object; write one JSON object per line")
        yield number, row


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):  # the last one would win, in silence
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return found


def half_a_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def read_texts(table: Table, column: str, remedy: str) -> list[str]:
    """Return a column of strings.

    Raises:
        DataError: the column is missing, or a value is not a string that UTF-8 can hold.
    """
    texts = []
    for number, value in enumerate(table.column(column, remedy)):
        if not isinstance(value, str):
            problem = f"column {column!r} holds {shown(value)}, not text"
            raise table.error(number, f"{problem}; make it a string or drop the row")
        if half_a_pair(value):
            raise table.error(number, f"column {column!r} holds half of a surrogate pair; repair or drop the row")
        texts.append(value)
    return texts


def read_targets(table: Table, column: str, remedy: str) -> list[float]:
    """Return a column of finite numbers (in CSV: their decimal spelling).

    Raises:
        DataError: the column is missing, or a value is not a finite number.
    """
    targets = []
    for number, value in enumerate(table.column(column, remedy)):
        target = _number(value)
        if target is None:
            problem = f"the label {shown(value)} is not a finite number"
            raise table.error(number, f"{problem}; repair or drop the row, or leave regression off for classes")
        targets.append(target)
    return targets


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """A value of a row as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

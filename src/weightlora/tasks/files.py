"""The user's own JSONL and CSV files, and every way in which they can be wrong, said with file and line."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks.examples import Examples

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSONL = (".jsonl", ".json", ".ndjson")
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,300}")


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
        Its rows; blank lines are skipped.

    Raises:
        DataError: missing or empty file, unknown suffix, broken line, a line that is not an object, wrong number of
            cells; the message names file, line and remedy.
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
    parse = _jsonl_rows(path, text) if suffix in JSONL else _csv_rows(path, text, DELIMITERS[suffix])
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
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: broken JSON ({error}); write one JSON object per line") from None
        if not isinstance(row, dict):
            kind = "a list" if isinstance(row, list) else f"the value {line.strip()[:40]}"
            raise DataError(f"{path}:{number}: {kind}, not an object; write one JSON object per line")
        yield number, row


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, object]]]:
    # strict: an unclosed quote must be an error, not a cell that swallows the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{start}: broken CSV ({error}); check the quotes of this row") from None
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{path}:{start}: the header names a column twice; give every column its own name")
        elif len(cells) != len(header):
            problem = f"{len(cells)} cells where the header has {len(header)}; quote cells that hold a {delimiter!r}"
            raise DataError(f"{path}:{start}: {problem}")
        else:
            yield start, dict(zip(header, cells, strict=True))


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
            shown = _shown(value)
            raise table.error(number, f"column {column!r} holds {shown}, not text; make it a string or drop the row")
        if half_a_pair(value):
            raise table.error(number, f"column {column!r} holds half of a surrogate pair; repair or drop the row")
        texts.append(value)
    return texts


def read_classes(table: Table, column: str, remedy: str) -> list[str]:
    """Return a column of class names; whole numbers and booleans become their JSON spelling.

    Raises:
        DataError: the column is missing, or a value is neither a string nor a whole number, or is empty.
    """
    names = []
    for number, value in enumerate(table.column(column, remedy)):
        if isinstance(value, bool):
            names.append("true" if value else "false")
        elif isinstance(value, int) or (isinstance(value, str) and value):
            names.append(str(value))
        else:
            problem = f"the label {_shown(value)} is not a class; use a string or a whole number"
            raise table.error(number, f"{problem}, or ask for regression where the target is a number")
    return names


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Return class names in order: by value if all are whole numbers, else by text.

    >>> sort_classes({"10", "9", "-1"}), sort_classes({"b", "a", "10"})
    (('-1', '9', '10'), ('10', 'a', 'b'))
    """
    if all(WHOLE_NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def read_targets(table: Table, column: str, remedy: str) -> list[float]:
    """Return a column of finite numbers (in CSV: their decimal spelling).

    Raises:
        DataError: the column is missing, or a value is not a finite number.
    """
    targets = []
    for number, value in enumerate(table.column(column, remedy)):
        target = _number(value)
        if target is None:
            problem = f"the label {_shown(value)} is not a finite number"
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


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def load_files(
    train_file: Path,
    validation_file: Path | None,
    *,
    text_columns: tuple[str, ...],
    label_column: str,
    regression: bool,
) -> tuple[Examples, Examples | None, tuple[str, ...] | None]:
    """Read the user's files into examples.

    Args:
        train_file: rows to train on; they define the classes.
        validation_file: rows to judge by, or None.
        text_columns: one column, or two for pairs.
        label_column: classes, or numbers for regression.
        regression: whether labels are numbers.

    Returns:
        Training examples, validation examples or None, class names or None for regression.

    Raises:
        DataError: see `read_table`, `read_texts`, `read_classes` and `read_targets`; a single class in training; a
            validation label unseen in training.
    """
    tables = [read_table(path) for path in (train_file, validation_file) if path is not None]
    texts = [{name: read_texts(table, name, _remedy(name, text_columns)) for name in text_columns} for table in tables]
    remedy = "name the label's column with label_column"
    labels: list[list[int] | list[float]]
    classes: tuple[str, ...] | None = None
    if regression:
        labels = [*(read_targets(table, label_column, remedy) for table in tables)]
    else:
        names = [read_classes(table, label_column, remedy) for table in tables]
        classes = sort_classes(set(names[0]))
        if len(classes) < 2:
            problem = f"all training labels are {classes[0]!r}; a classification task needs at least two classes"
            raise DataError(f"{train_file}: column {label_column!r}: {problem}, check label_column")
        labels = [*(_encode(table, column, classes) for table, column in zip(tables, names, strict=True))]
    train, *rest = (Examples(texts=text, labels=label) for text, label in zip(texts, labels, strict=True))
    return train, rest[0] if rest else None, classes


def _remedy(column: str, text_columns: tuple[str, ...]) -> str:
    option = "text_column" if column == text_columns[0] else "pair_column"
    return f"name the text's column with {option}"


def _encode(table: Table, names: list[str], classes: tuple[str, ...]) -> list[int]:
    index = {name: number for number, name in enumerate(classes)}
    for row, name in enumerate(names):
        if name not in index:
            known = ", ".join(map(repr, classes[:8])) + (", ..." if len(classes) > 8 else "")
            problem = f"the label {name!r} does not occur in training (there: {known})"
            raise table.error(row, f"{problem}; correct it, or add training rows with it")
    return [index[name] for name in names]

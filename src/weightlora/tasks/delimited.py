"""CSV and TSV text as rows: which delimiter it has, what its quotes mean, and where a row ends."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks.told import tell_once

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_KNOWN = (",", ";", "\t", "|")
_EXCEL_LINE = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)
_LIMIT = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The cells of one row, on lines ``first`` to ``last``."""

    first: int
    last: int
    cells: list[str]


def delimited_rows(path: Path, text: str, delimiter: str) -> list[tuple[int, dict[str, object]]]:
    """Return the rows of a table with a header, each with the line it starts on.

    A header without the delimiter that the suffix promises, but with another common one, decides for that one
    (spreadsheets write ``;`` where the comma is the decimal point); so does Excel's line ``sep=;``.

    Quotes enclose cells, as RFC 4180 has it. In a file with tabs a quote may also be a character like any other: where
    a quote that encloses nothing would break a row or swallow others, and every line is a row without it, it is text.

    Raises:
        DataError: broken quotes, a row with another number of cells than the header, a column named twice.
    """
    lines = io.StringIO(text, newline="").readlines()
    with _cells_of_any_length(len(text)):
        excel = _EXCEL_LINE.fullmatch(lines[0].rstrip("\r\n")) if lines else None
        delimiter = excel[1] if excel else _delimiter(lines, delimiter)
        records, fault = _quoted(lines, int(excel is not None), delimiter)
    spans = [record for record in records if record.last > record.first]
    if delimiter == "\t" and (fault or spans) and (plain := _unquoted(lines, int(excel is not None))):
        line = fault[0] if fault else spans[0].first
        tell_once(
            logging.WARNING,
            f"{path}:{line}: a quote that encloses no cell; all quotes of this file are read as text, and every line as"
            " a row",
        )
        records, fault, spans = plain, None, []
    if fault:
        raise DataError(f"{path}:{fault[0]}: {fault[1]}")
    if not records:
        return []
    header = records[0].cells
    if len(set(header)) < len(header):
        twice = Counter(header).most_common(1)[0][0]
        problem = f"the header names a column twice ({twice!r})"
        raise DataError(f"{path}:{records[0].first}: {problem}; give every column its own name")
    _tell_swallowed(path, [r for r in spans if _are_rows(lines[r.first - 1 : r.last], delimiter, len(header))])
    return [(record.first, dict(zip(header, record.cells, strict=True))) for record in records[1:]]


def _delimiter(lines: list[str], expected: str) -> str:
    """The delimiter of the header: the expected one if it is there, else the common one that cuts it most often."""
    header = next((line for line in lines if line.strip()), "")
    found = {other: _count(header, other) for other in (expected, *_KNOWN)}
    return expected if found[expected] > 1 else max(found, key=found.__getitem__)


def _count(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True)))
    except (csv.Error, StopIteration):
        return 0


@contextlib.contextmanager
def _cells_of_any_length(length: int) -> Iterator[None]:
    """Let the csv module read cells of up to `length` characters; its limit is the process's, and is put back."""
    with _LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, length))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _quoted(lines: list[str], skip: int, delimiter: str) -> tuple[list[_Record], tuple[int, str] | None]:
    """The header and the rows by the rules of CSV, up to the first fault: its line and what is wrong."""
    # strict: an unclosed quote must be an error, not a cell that swallows the rest of the file.
    reader = csv.reader(lines[skip:], delimiter=delimiter, strict=True)
    records: list[_Record] = []
    while True:
        first = skip + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return records, None
        except csv.Error as error:
            return records, (first, f"broken CSV ({error}); check the quotes of this row")
        width = len(records[0].cells) if records else 0
        if not "".join(cells).strip() and len(cells) < max(width, 2):
            continue  # a blank line
        if records and len(cells) != width:
            remedy = f"quote cells that hold a {delimiter!r}"
            return records, (first, f"{len(cells)} cells where the header has {width}; {remedy}")
        records.append(_Record(first=first, last=skip + reader.line_num, cells=cells))


def _unquoted(lines: list[str], skip: int) -> list[_Record]:
    """The header and the rows of a text with tabs, one per line; none where lines differ in their number of cells."""
    rows = [
        (number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start=1) if line.strip(" \r\n")
    ]
    records = [_Record(first=number, last=number, cells=cells) for number, cells in rows if number > skip]
    return records if len({len(record.cells) for record in records}) == 1 else []


def _are_rows(lines: list[str], delimiter: str, width: int) -> bool:
    """Whether each of the lines would be a row if quotes were text."""
    return all(len(line.split(delimiter)) == width for line in lines)


def _tell_swallowed(path: Path, records: list[_Record]) -> None:
    if records:
        first, last, count = records[0].first, records[0].last, len(records)
        tell_once(
            logging.WARNING,
            f"{path}:{first}: a quote opens here and closes on line {last}, so these lines are read as one row, but"
            f" each would be a row without it ({count} such place{'s' * (count > 1)}); if it is part of a text, enclose"
            " that text in quotes and double the quotes within",
        )

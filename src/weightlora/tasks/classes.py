"""Class names of the user's own tables: read, sorted, counted, and compared for names that may mean one class."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from weightlora.tasks.files import Table, shown
from weightlora.tasks.told import tell_once

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,300}")
_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,3})?")
_LISTED = 8


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
            problem = f"the label {shown(value)} is not a class; use a string or a whole number"
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


def alike(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ only in blanks, case, Unicode form or the spelling of a number.

    >>> alike(["pos", "neg", "pos ", "POS", "1", "1.0", "01", "10"])
    [['POS', 'pos', 'pos '], ['01', '1', '1.0']]
    """
    groups: dict[str | Decimal, list[str]] = defaultdict(list)
    for name in names:
        groups[_meaning(name)].append(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def _meaning(name: str) -> str | Decimal:
    text = " ".join(unicodedata.normalize("NFKC", _visible(name)).casefold().split())
    # Not a float: 2^53 and 2^53 + 1 are two classes.
    return Decimal(text) if _NUMBER.fullmatch(text) else unicodedata.normalize("NFKC", text)


def _visible(name: str) -> str:
    return "".join(letter for letter in name if unicodedata.category(letter) != "Cf")


def tell_classes(table: Table, column: str, names: Sequence[str]) -> None:
    """Log the classes of the training rows with their counts, and warn of what may be a mistake in them."""
    counts = Counter(names)
    listed = ", ".join(f"{_short(name)} {count}" for name, count in counts.most_common(_LISTED))
    rest = f", and {len(counts) - _LISTED} more, the smallest with {min(counts.values())}"
    listed += rest if len(counts) > _LISTED else ""
    tell_once(logging.INFO, f"{table.path}: {len(names)} rows in {len(counts)} classes: {listed}")
    if groups := alike(counts):
        several = "; ".join(_group(group, counts) for group in groups[:_LISTED])
        more = f"; and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
        tell_once(
            logging.WARNING,
            f"{table.path}: column {column!r} has classes that may be meant as one: {several}{more};"
            " if so, give them one spelling",
        )
    if single := sorted(name for name, count in counts.items() if count == 1):
        some = ", ".join(map(_short, single[:_LISTED])) + (", ..." if len(single) > _LISTED else "")
        tell_once(
            logging.WARNING,
            f"{table.path}: {len(single)} of {len(counts)} classes in column {column!r} have one row ({some}): it is"
            " trained on and never held out; check that the column holds classes",
        )


def _group(names: Sequence[str], counts: Counter[str]) -> str:
    looks = {unicodedata.normalize("NFC", _visible(name)) for name in names}
    spell = repr if len(looks) == len(names) else ascii  # what looks the same is told apart by its numbers
    return " and ".join(f"{_short(name, spell)} ({counts[name]} row{'s' * (counts[name] > 1)})" for name in names)


def _short(name: str, spell: Callable[[str], str] = repr) -> str:
    text = spell(name)
    return text if len(text) <= 40 else f"{text[:37]}..."

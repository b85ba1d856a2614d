"""The user's own labelled files as examples: what is in them is counted, and said before anything is trained on it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks.classes import read_classes, sort_classes, tell_classes
from weightlora.tasks.examples import Examples
from weightlora.tasks.files import Table, read_table, read_targets, read_texts
from weightlora.tasks.told import tell_once


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

    Logged: the classes with their counts; warnings of empty texts, of texts with several labels, and of classes that
    may be meant as one.
    """
    tables = [read_table(path) for path in (train_file, validation_file) if path is not None]
    texts = [{name: read_texts(table, name, _remedy(name, text_columns)) for name in text_columns} for table in tables]
    for table, columns in zip(tables, texts, strict=True):
        _tell_texts(table, columns)
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
        tell_classes(tables[0], label_column, names[0])
        _tell_contradictions(tables[0], texts[0], names[0])
        labels = [*(_encode(table, column, classes) for table, column in zip(tables, names, strict=True))]
    train, *rest = (Examples(texts=text, labels=label) for text, label in zip(texts, labels, strict=True))
    return train, rest[0] if rest else None, classes


def _remedy(column: str, text_columns: tuple[str, ...]) -> str:
    option = "text_column" if column == text_columns[0] else "pair_column"
    return f"name the text's column with {option}"


def _tell_texts(table: Table, columns: dict[str, list[str]]) -> None:
    for name, texts in columns.items():
        if empty := sum(not text.strip() for text in texts):
            tell_once(logging.WARNING, f"{table.path}: {empty} of {len(texts)} rows have no text in column {name!r}")


def _tell_contradictions(table: Table, columns: dict[str, list[str]], names: list[str]) -> None:
    labelled = set(zip(*columns.values(), names, strict=True))
    times = Counter(row[:-1] for row in labelled)
    if several := sum(count > 1 for count in times.values()):
        tell_once(
            logging.WARNING,
            f"{table.path}: {several} of {len(times)} different texts have more than one label; no model learns both",
        )


def _encode(table: Table, names: list[str], classes: tuple[str, ...]) -> list[int]:
    index = {name: number for number, name in enumerate(classes)}
    for row, name in enumerate(names):
        if name not in index:
            known = ", ".join(map(repr, classes[:8])) + (", ..." if len(classes) > 8 else "")
            problem = f"the label {name!r} does not occur in training (there: {known})"
            raise table.error(row, f"{problem}; correct it, or add training rows with it")
    return [index[name] for name in names]

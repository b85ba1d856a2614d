"""Texts with labels, and the two seeded ways to cut them: a random subset and a stratified hold-out."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from weightlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows of one split, column by column.

    Args:
        texts: one list of strings per text column, in the order in which the tokenizer gets them.
        labels: one class index (``int``) or one target (``float``) per row.
    """

    texts: dict[str, list[str]]
    labels: list[int] | list[float]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.texts.items()}
        if any(length != len(self.labels) for length in lengths.values()):
            raise ConfigError(f"text columns {lengths} and {len(self.labels)} labels differ in length; make them equal")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return the given rows, in the given order.

        >>> Examples(texts={"t": ["a", "b", "c"]}, labels=[0, 1, 2]).take([2, 0]).texts
        {'t': ['c', 'a']}
        """
        texts = {name: [column[row] for row in rows] for name, column in self.texts.items()}
        return Examples(texts=texts, labels=[self.labels[row] for row in rows])


def shuffled(count: int, *, seed: int, stream: str) -> list[int]:
    """Return ``0 .. count-1`` in a random order that depends on ``seed`` and ``stream`` alone.

    Sorting by ``random.Random.random()`` is the one recipe whose results Python promises to keep between versions;
    the global random states are not touched.

    Args:
        count: how many numbers.
        seed: the user's seed.
        stream: a word for the purpose, so that equal seeds give unrelated orders for unrelated purposes.

    Returns:
        A permutation of ``range(count)``.

    >>> shuffled(5, seed=0, stream="train") == shuffled(5, seed=0, stream="train")
    True
    >>> sorted(shuffled(5, seed=0, stream="train"))
    [0, 1, 2, 3, 4]
    """
    generator = random.Random(f"{stream}:{seed}")
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def subset(examples: Examples, limit: int | None, *, seed: int, stream: str) -> Examples:
    """Return ``limit`` random rows in random order; all rows, untouched, when ``limit`` is None.

    The choice for a smaller limit is a prefix of the choice for a larger one.

    >>> rows = Examples(texts={"t": list("abcd")}, labels=[0, 1, 2, 3])
    >>> len(subset(rows, 3, seed=0, stream="train"))
    3
    """
    if limit is None:
        return examples
    return examples.take(shuffled(len(examples), seed=seed, stream=stream)[:limit])


def hold_out(examples: Examples, fraction: float, *, seed: int, stratify: bool) -> tuple[Examples, Examples]:
    """Cut ``round(fraction * n)`` random rows off, and return the rest and them, both in their old order.

    With ``stratify`` each class gives its share (largest remainder first) and keeps at least one row in the rest, so
    a class can never be unseen in training.

    Args:
        examples: the rows to cut.
        fraction: the part to hold out, in (0, 1).
        seed: chooses the rows.
        stratify: whether labels are classes, whose shares are kept.

    Returns:
        ``(rest, held_out)``.

    >>> rows = Examples(texts={"t": [str(i) for i in range(40)]}, labels=[0] * 30 + [1] * 10)
    >>> rest, held = hold_out(rows, 0.2, seed=0, stratify=True)
    >>> sorted(held.labels)
    [0, 0, 0, 0, 0, 0, 1, 1]
    """
    groups: dict[float, list[int]] = defaultdict(list)
    for row in shuffled(len(examples), seed=seed, stream="holdout"):
        groups[examples.labels[row] if stratify else 0].append(row)
    sizes = {label: len(rows) for label, rows in groups.items()}
    held: set[int] = set()
    for label, share in _shares(sizes, fraction).items():
        held.update(groups[label][:share])
    every = range(len(examples))
    return examples.take([row for row in every if row not in held]), examples.take(sorted(held))


def _shares(sizes: dict[float, int], fraction: float) -> dict[float, int]:
    """How many rows each class gives: its exact share rounded down, the remainder to the largest fractions."""
    exact = {label: size * fraction for label, size in sizes.items()}
    shares = {label: min(int(exact[label]), sizes[label] - 1) for label in sizes}
    missing = round(sum(sizes.values()) * fraction) - sum(shares.values())
    for label in sorted(sizes, key=lambda label: (int(exact[label]) - exact[label], label)):
        if missing > 0 and shares[label] < sizes[label] - 1:
            shares[label] += 1
            missing -= 1
    return shares

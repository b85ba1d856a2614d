"""How well a score tells the held-out loss of sets, given what is known of them without any score."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Floats = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A partial rank correlation with its bootstrap interval of 95%; below 0: a higher score, a lower loss."""

    correlation: float
    low: float
    high: float


def value(scores: Sequence[float], chosen: Sequence[int], blocks: Sequence[int], *, spread: bool = False) -> float:
    """What a score says of a set: its sum, or the sum over blocks of square roots."""
    useful = [max(scores[i], 0.0) if spread else scores[i] for i in chosen]
    if not spread:
        return math.fsum(useful)
    sums: dict[int, float] = {}
    for i, score in zip(chosen, useful, strict=True):
        sums[blocks[i]] = sums.get(blocks[i], 0.0) + score
    return math.fsum(math.sqrt(total) for total in sums.values())


def partial(loss: Floats, predictor: Floats, known: Floats, *, draws: int = 2000, seed: int = 0) -> Verdict:
    """Spearman's correlation of predictor and loss, with the ranks of what is known regressed out of both.

    Args:
        loss: (sets,).
        predictor: (sets,).
        known: (sets, facts): parameters, count, lowest block.
        draws: of the bootstrap over sets.
        seed: of its generator.
    """
    generator = np.random.default_rng(seed)
    count = len(loss)
    found = [_partial(loss, predictor, known)]
    for _ in range(draws):
        rows = generator.integers(0, count, count)
        found.append(_partial(loss[rows], predictor[rows], known[rows]))
    low, high = np.nanpercentile(found[1:], (2.5, 97.5))
    return Verdict(correlation=found[0], low=float(low), high=float(high))


def _partial(loss: Floats, predictor: Floats, known: Floats) -> float:
    columns = [stats.rankdata(column) for column in known.T]
    given = np.column_stack([np.ones(len(loss)), *columns])
    left = []
    for what in (loss, predictor):
        ranks = stats.rankdata(what)
        left.append(ranks - given @ np.linalg.lstsq(given, ranks, rcond=None)[0])
    spread = np.std(left[0]) * np.std(left[1])
    return float(np.mean(left[0] * left[1]) / spread) if spread > 1e-9 else 0.0


def load(path: str) -> tuple[list[dict[str, Any]], dict[str, list[float]], list[dict[str, Any]]]:
    """Read a placement table: its random sets (``set``, ``nats``, ``params``, ...), scores by name, adapters."""
    data = json.loads(Path(path).read_text())
    sets = [one for one in data["trials"] if one["label"].startswith("random ")]
    return sets, next(iter(data["scores"].values())), data["adapters"]

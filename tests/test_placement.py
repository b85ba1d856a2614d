"""The placement table's parts: how sets are drawn, and how a score is judged by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchlib.judging import load, partial, value
from placement import random_sets

BLOCKS = [i // 7 for i in range(210)]
KINDS = [str(i % 7) for i in range(210)]


def test_sets_are_spread_and_every_other_has_a_lowest_block() -> None:
    sets = random_sets(BLOCKS, KINDS, 60)
    assert sets == random_sets(BLOCKS, KINDS, 60)
    assert all(chosen == sorted(set(chosen)) and 1 <= len(chosen) <= 84 for chosen in sets)
    large = [chosen for chosen in sets[::2] if len(chosen) >= 21]
    assert large
    assert all({KINDS[i] for i in chosen} == set(KINDS) for chosen in large)
    lowest = {number: min(BLOCKS[i] for i in chosen) for number, chosen in enumerate(sets)}
    assert np.mean([lowest[n] for n in range(1, 60, 2)]) > np.mean([lowest[n] for n in range(0, 60, 2)])


def test_what_is_known_already_is_no_merit_of_a_score() -> None:
    draw = np.random.default_rng(0)
    known, noise, news = (draw.normal(size=80) for _ in range(3))
    loss = -known - news
    idle = partial(loss, known + noise, known[:, None], draws=200)
    assert idle.low < 0 < idle.high
    telling = partial(loss, known + news, known[:, None], draws=200)
    assert telling.high < -0.5
    assert telling.low <= telling.correlation <= telling.high


def test_a_spread_value_is_the_sum_of_roots_over_blocks() -> None:
    assert value([4.0, 5.0, 9.0, -1.0], [0, 1, 2, 3], [0, 0, 1, 2]) == pytest.approx(17)
    assert value([4.0, 5.0, 9.0, -1.0], [0, 1, 2, 3], [0, 0, 1, 2], spread=True) == pytest.approx(6)


def test_the_stored_table_can_be_loaded() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "placement-smollm2-sst2.json"
    sets, scores, adapters = load(str(path))
    assert len(sets) == 60
    assert {len(values) for values in scores.values()} == {len(adapters)} == {210}
    names = {a["name"]: i for i, a in enumerate(adapters)}
    assert [names[a["name"]] for a in adapters] == list(range(210))
    blocks, kinds = [a["block"] for a in adapters], [a["kind"] for a in adapters]
    assert [one["set"] for one in sets] == random_sets(blocks, kinds, 60)
    assert json.loads(path.read_text())["rate"] == 1e-3

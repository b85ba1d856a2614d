"""Checkpointing beside fewer adapters: the page has the stored numbers, and fake tensors count as real ones do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adapter_path import Bench
from benchlib.shapes import SHAPES
from benchlib.verdicts import HALF
from checkpointing import RESULTS, STUDIES, chosen, rows, settings, shares
from weightlora.cost.measure import step_cost
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


def test_operations_of_fake_tensors_are_those_of_real_ones() -> None:
    args = settings(rank=4)
    found = {(row["set"], row["checkpointing"]): row for row in rows("tiny", SHAPES["tiny"], args)}
    bench = Bench(SHAPES["tiny"], args)
    for again in (False, True):
        if again:
            checkpoint_blocks(bench.root)  # type: ignore[arg-type]
            end_backward_at_lowest(bench.model)
        for label, live in chosen("tiny", list(bench.layers)).items():
            with bench.ours(live):
                assert step_cost(bench.model, bench.loss).flops == found[label, again]["operations"]
    assert (
        found["all", True]["operations"] > found["all", False]["operations"] > found["upper half", False]["operations"]
    )


def test_the_page_says_what_was_counted() -> None:
    stored = json.loads((RESULTS / "checkpointing.json").read_text())["rows"]
    told = re.findall(
        r"^\| ([\w.-]+) \| ([\w ]+), (\d+) \| (yes|no) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M
    )
    expected = [
        (row["shape"], row["set"], str(row["adapters"]), "yes" if row["checkpointing"] else "no", shares(row, stored))
        for row in stored
    ]
    assert told == expected
    assert len(told) == 20


@pytest.mark.parametrize("name", STUDIES)
def test_the_sets_are_those_of_the_study(name: str) -> None:
    stored = json.loads((RESULTS / "checkpointing.json").read_text())["rows"]
    study = json.loads((RESULTS / STUDIES[name]).read_text())
    counts = {row["set"]: row["adapters"] for row in stored if row["shape"] == name}
    half = next(trial["set"] for trial in study["trials"] if trial["label"] == HALF)
    assert (counts["all"], counts["credit"]) == (len(study["adapters"]), len(half))

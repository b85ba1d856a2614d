"""The page of all methods at one budget says what its results say, row by row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "methods-tuned-100-steps-docstrings.json"


def name(row: dict[str, Any]) -> str:
    return row["method"] + ("" if row["preset"] == "recommended" else f":{row['preset']}")


def rate(value: float) -> str:
    return re.sub(r"e-0?", "e-", f"{value:.0e}")


def expected(row: dict[str, Any], tuning: list[dict[str, Any]]) -> str:
    """The row as the page has it, and that the rate is the best of those that were tried."""
    tried = [one for one in tuning if name(one) == name(row)]
    best = min(tried, key=lambda one: one["eval_loss"], default=row)
    assert best["learning_rate"] == row["learning_rate"]
    said = ", ".join(f"{rate(one['learning_rate'])}: {one['eval_loss']:.3f}" for one in tried) or "not tuned"
    size = "-" if row["effective_params"] is None else f"{row['effective_params'] / 1000:.0f} k"
    cells = [f"`{name(row)}`", rate(row["learning_rate"]), said, f"{row['eval_loss']:.4f}", f"{row['accuracy']:.4f}"]
    return f"| {' | '.join([*cells, str(row['adapters'] or '-'), size])} |"


def test_every_row_is_that_of_the_results() -> None:
    data = json.loads(RESULTS.read_text())
    page = (ROOT / "docs" / "one-budget.md").read_text(encoding="utf-8")
    table = page.partition("| method |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == [expected(row, data["tuning"]) for row in data["rows"]]
    assert len(table) == 32
    assert [row["eval_loss"] for row in data["rows"]] == sorted(row["eval_loss"] for row in data["rows"])

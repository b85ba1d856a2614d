"""The paper's numbers: every one is where the paper prints it, and stands beside ours with what differs."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from weightlora.report import paper_table, sweep_table
from weightlora.study.paper import TABLES, printed

ROOT = Path(__file__).resolve().parents[2]
each_table = pytest.mark.parametrize("table", TABLES)


@pytest.fixture(scope="module")
def paper() -> dict[str, list[list[str]]]:
    """The cells of the paper's tables, line by line, from its text."""
    path = Path(os.environ.get("WEIGHTLORA_PAPER", ROOT.parent / "shared" / "reference" / "paper.txt"))
    if not path.is_file():
        pytest.skip(f"NO PAPER: {path} does not exist; set WEIGHTLORA_PAPER to the text of the paper")
    tables: dict[str, list[list[str]]] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"Table (\d): ", line):
            name = f"table{found[1]}"
        elif name and "\t" in line:
            tables.setdefault(name, []).append([re.sub("</?u>", "", cell).strip() for cell in line.split("\t")])
        elif name in tables and line.strip():
            name = ""  # the text goes on
    return tables


def shown(values: list[float], digits: int) -> str:
    return "/".join(f"{value:.{digits}f}" for value in values)


def glue_lines(table: str) -> list[list[str]]:
    """The cells of a GLUE table as they should stand in the paper, without names."""
    lines = []
    for row in printed(table)["rows"]:
        scores = [shown(values, 4) for values in row["scores"].values()]
        lines.append([*filter(None, [row["params"]]), *scores, f"{row['average']:.4f}"])
    return lines


@pytest.mark.parametrize(("table", "names"), [("table1", 1), ("table2", 2), ("table3", 2), ("table6", 2)])
def test_every_number_of_a_glue_table_is_the_papers(paper: dict[str, list[list[str]]], table: str, names: int) -> None:
    lines = [line[names:] for line in paper[table] if re.search(r"0\.\d{4}", "".join(line))]
    assert lines == glue_lines(table)


@pytest.mark.parametrize("table", ["table4", "table5"])
def test_every_number_of_a_table_by_rank_is_the_papers(paper: dict[str, list[list[str]]], table: str) -> None:
    rows, tasks = printed(table)["rows"], list(printed(table)["metrics"])
    lines = [line[2:] for line in paper[table] if line[1] in ("F1-score", "# Params")]
    expected = []
    for four in (rows[start : start + 4] for start in range(0, len(rows), 4)):
        expected.append([shown(row["scores"][task], 2) for task in tasks for row in four])
        expected.append([row["params"] for _ in tasks for row in four])
    assert lines == expected


@pytest.mark.parametrize(
    ("table", "row", "printed_there"),
    [
        ("table1", "LoRA", "LoRA 442K 0.8797 0.9450 0.6913"),
        ("table1", "MELoRA", "MELoRA 110K 0.7986 0.9358 0.6188 0.7599/0.8342"),
        ("table1", "WLoRA k=10", "WLoRA k=10 123K 0.8706 0.9473 0.6703"),
        ("table2", "WLoRA k=20 r=4", "r=4 WLoRA k=20 0.09% 0.8600 0.9614 0.6824 0.9005/0.8762"),
        ("table2", "WLoRA+ r=8", "r=8 WLoRA+ 0.51% 0.9074 0.9644 0.6934 0.9212/0.8926"),
        ("table3", "WLoRA+ r=2", "r=2 WLoRA+ 0.13% 0.9133 0.9703 0.6587"),
        ("table4", "WLoRA+ k=15 r=2", "WLoRA k=15 92.20 83.13"),
        ("table5", "LoRA r=2", "LoRA 35.59 24.50"),
        ("table6", "RLoRA K=5", "K=5 RLoRA 0.7260 0.9178 0.5217"),
    ],
)
def test_rows_have_the_right_names(table: str, row: str, printed_there: str) -> None:
    """Read off the paper by eye, so that a whole row cannot have slipped."""
    found = next(entry for entry in printed(table)["rows"] if entry["row"] == row)
    digits = 2 if printed(table)["percent"] else 4
    numbers = re.findall(r"\d+\.\d+(?:/0\.\d+)?(?![\d%.K])", printed_there)
    assert [shown(values, digits) for values in found["scores"].values()][: len(numbers)] == numbers


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table6"])
def test_averages_follow_from_the_scores_but_for_the_known_misprints(table: str) -> None:
    """A second check of the typing: pairs are averaged first, then tasks."""
    wrong = {}
    for row in printed(table)["rows"]:
        tasks = [math.fsum(values) / len(values) for values in row["scores"].values()]
        mean = math.fsum(tasks) / len(tasks)
        if abs(mean - row["average"]) > 6e-5:
            wrong[row["row"]] = (row["average"], round(mean, 4))
    known = printed(table).get("misprinted_averages", [])
    assert wrong == {entry["row"]: (entry["printed"], entry["computed"]) for entry in known}


def run(seed: int, metrics: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    name = next(iter(metrics), "")
    entry = {"folder": f"runs/{seed}", "method": "lora", "preset": "paper", "settings": {"learning_rate": 1e-3}}
    entry |= {"seed": seed, "status": "ok", "error": None, "metric": name, "score": metrics.get(name)}
    entry |= {"metrics": metrics, "scored_on": {"split": "validation", "rows": 9}, "adapters": 3, "params": 1200}
    return entry | changes


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema_version": 1, "learning_rates": [1e-3], "lr_warmups": [], "seeds": [0, 1], "selection_seeds": [0],
            "cells": cells}  # fmt: skip


def cell(row: str, task: str, runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"row": row, "task": task, "chosen": {"learning_rate": 1e-3}, "trials": [], "runs": runs} | more


def test_the_table_sets_the_papers_numbers_beside_ours() -> None:
    there = printed("table1")
    lora = next(row for row in there["rows"] if row["row"] == "LoRA")
    cells = []
    for task, names in there["metrics"].items():
        runs = [run(seed, {name: 0.5 + seed / 4 + number / 8 for number, name in enumerate(names)}) for seed in (0, 1)]
        paper = {"scores": lora["scores"][task], "params": lora["params"]}
        cells.append(cell("LoRA", task, runs, paper=paper, differs=["a small model"] + ["slow"] * (task == "cola")))
    data = summary(cells) | {"experiment": "table1", "title": "t", "percent": False, "metrics": there["metrics"],
                             "averages": {"LoRA": 0.8655}, "note": "a note"}  # fmt: skip
    table = paper_table(data)
    by_task = {row["task"]: row for row in table.rows}
    cells_by_task = {row[1]: row for row in table.cells}
    assert list(by_task) == [*there["metrics"], "ALL"]
    # 0.5 and 0.75: mean 0.625, sample standard deviation 0.25 / sqrt 2.
    assert cells_by_task["cola"][2:6] == ("0.6913", "0.6250 ± 0.1768", f"{0.625 - 0.6913:+.4f}", "2/2")
    assert cells_by_task["qqp"][2:4] == ("0.8802/0.8437", "0.6250/0.7500 ± 0.1768/0.1768")
    assert by_task["qqp"]["difference"] == pytest.approx(0.6875 - (0.8802 + 0.8437) / 2)
    ours = (5 * 0.625 + 2 * 0.6875) / 7
    assert by_task["ALL"]["ours"] == [pytest.approx(ours)]
    assert by_task["ALL"]["difference"] == pytest.approx(ours - 0.8655)
    assert [row[-1] for row in table.cells] == ["", "", "a", "", "", "", "", "a"]
    assert table.notes[1:] == (
        "what differs from the paper's protocol:",
        "all) a small model",
        "a) slow",
        "a note",
    )
    assert table.notes[0].startswith(
        "scores: mnli accuracy_matched, sst2 accuracy, cola matthews_correlation, qqp accuracy/f1"
    )
    some = paper_table(data | {"cells": cells[:3]})
    assert [row["task"] for row in some.rows] == ["mnli", "sst2", "cola"], "no average over a part of the tasks"


def test_what_is_missing_is_said_and_not_made_up() -> None:
    there = {"scores": [0.8448], "params": "442K"}
    failed = run(1, {}, status="failed", error="DataError: no such folder", params=None, adapters=0)
    cells = [
        cell("LoRA", "rte", [failed, failed], paper=there, differs=[]),
        cell("mine", "rte", [run(0, {"accuracy": 0.5})], paper={"scores": None, "params": None}, differs=["new"]),
        cell("LoRA", "sst2", [run(0, {"accuracy": None})], paper=there, differs=[], chosen=None),
    ]
    data = summary(cells) | {"experiment": "table1", "title": "t", "percent": False, "averages": {}, "note": "",
                             "metrics": {"rte": ["accuracy"], "sst2": ["accuracy"]}}  # fmt: skip
    table = paper_table(data)
    shown_cells = {(row[0], row[1]): row[2:6] for row in table.cells}
    assert shown_cells["LoRA", "rte"] == ("0.8448", "-", "-", "0/2")
    assert shown_cells["mine", "rte"] == ("-", "0.5000", "-", "1/1")
    assert shown_cells["LoRA", "sst2"][1] == "nan", "a diverged run is no reason to look better"
    assert "failed (2 runs): rte, LoRA: DataError: no such folder" in table.notes
    text = sweep_table(summary(cells)).to_text(200)
    assert "failed (2 runs): rte, LoRA: DataError: no such folder" in text
    rows = json.loads(table.to_json())["rows"]
    assert {(row["row"], row["task"]): row["ours"] for row in rows} == {
        ("LoRA", "rte"): None,
        ("LoRA", "sst2"): [None],
        ("mine", "rte"): [0.5],
    }

"""The paper's numbers beside ours, and what differs from the paper's protocol."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from weightlora.report.sweeps import failures
from weightlora.report.tables import Table
from weightlora.report.units import COUNT, MISSING, human, mean_and_spread

_TITLES = ("row", "task", "paper", "ours", "differ~ence", "seeds", "params, paper", "params, ours", "see")


def paper_table(data: Mapping[str, Any]) -> Table:
    """One line per row and task of a table of the paper; ALL where every task of the paper's table was run.

    A score that is a pair (accuracy / F1) is averaged before the tasks are, as the paper does. The difference is ours
    less the paper's. Departures from the paper's protocol that all lines share are noted below the table; the letters
    under `see` name the notes of those that only some lines have.

    Args:
        data: what `reproduce` writes to ``<experiment>.json``.
    """
    reasons = dict.fromkeys(line for cell in data["cells"] for line in cell["differs"])
    common = [line for line in reasons if all(line in cell["differs"] for cell in data["cells"])]
    marks = {line: _mark(number) for number, line in enumerate(line for line in reasons if line not in common)}
    rows = []
    for name in dict.fromkeys(cell["row"] for cell in data["cells"]):
        cells = [cell for cell in data["cells"] if cell["row"] == name]
        rows += [_row(data, cell) for cell in cells]
        if {cell["task"] for cell in cells} >= set(data["metrics"]) and data["averages"].get(name) is not None:
            rows.append(_average(data["averages"][name], name, rows[-len(cells) :]))
    used = dict.fromkeys(cell["task"] for cell in data["cells"])
    metrics = (f"{task} {'/'.join(data['metrics'][task])}" for task in used if task in data["metrics"])
    notes = [f"scores: {', '.join(metrics)}"]
    notes += ["what differs from the paper's protocol:"] if reasons else []
    notes += [f"all) {line}" for line in common] + [f"{mark}) {line}" for line, mark in marks.items()]
    notes += [data["note"]] if data["note"] else []
    notes += failures(data)
    return Table(
        caption=f"{data['experiment']}: {data['title']}; the paper's means of five seeds, ours ± spread",
        titles=_TITLES,
        cells=tuple(_cells(row, marks, 2 if data["percent"] else 4) for row in rows),
        notes=tuple(notes),
        rows=tuple(rows),
    )


def _row(data: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    names = data["metrics"].get(cell["task"])
    done = [run for run in cell["runs"] if run["status"] == "ok"]
    names = names or sorted({run["metric"] for run in done})
    ours = [mean_and_spread([run["metrics"].get(name) for run in done]) for name in names] if done else []
    params = [run["params"] for run in done if run["params"] is not None]
    theirs = cell["paper"]["scores"]
    means = [mean for mean, _ in ours if mean is not None]
    return {
        "row": cell["row"],
        "task": cell["task"],
        "metrics": names,
        "paper": theirs,
        "ours": means or None,
        "spread": [spread for _, spread in ours] or None,
        "difference": math.fsum(means) / len(means) - math.fsum(theirs) / len(theirs) if means and theirs else None,
        "ok": len(done),
        "total": len(cell["runs"]),
        "paper_params": cell["paper"]["params"],
        "params": mean_and_spread(params)[0],
        "differs": cell["differs"],
    }


def _average(printed: float, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The row over all tasks."""
    known = [mean_and_spread(row["ours"])[0] for row in rows if row["ours"]]
    mean = mean_and_spread(known)[0] if len(known) == len(rows) else None
    return {
        "row": name,
        "task": "ALL",
        "metrics": ["average"],
        "paper": [printed],
        "ours": None if mean is None else [mean],
        "spread": None,
        "difference": None if mean is None else mean - printed,
        "ok": min(row["ok"] for row in rows),
        "total": min(row["total"] for row in rows),
        "paper_params": rows[0]["paper_params"],
        "params": None,
        "differs": list(dict.fromkeys(line for row in rows for line in row["differs"])),
    }


def _cells(row: Mapping[str, Any], marks: Mapping[str, str], digits: int) -> tuple[str, ...]:
    spread = [value for value in row["spread"] or () if value is not None]
    return (
        row["row"],
        row["task"],
        _numbers(row["paper"], digits) or MISSING,
        (_numbers(row["ours"], digits) or MISSING) + (f" ± {_numbers(spread, digits)}" if spread else ""),
        MISSING if row["difference"] is None else f"{row['difference']:+.{digits}f}",
        f"{row['ok']}/{row['total']}",
        row["paper_params"] or MISSING,
        human(row["params"], COUNT),
        " ".join(marks[line] for line in row["differs"] if line in marks),
    )


def _numbers(values: Sequence[float] | None, digits: int) -> str:
    return "/".join(f"{value:.{digits}f}" for value in values or ())


def _mark(number: int) -> str:
    """a, b, ..., z, a1, b1, ...

    >>> _mark(0), _mark(27)
    ('a', 'b1')
    """
    times, letter = divmod(number, len(string.ascii_lowercase))
    return string.ascii_lowercase[letter] + (str(times) if times else "")

"""A sweep in one table: per task and row the chosen setting, and mean and spread of its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from weightlora.errors import ConfigError
from weightlora.report.tables import Table, comparison_table
from weightlora.report.units import COUNT, MISSING, human, mean_and_spread
from weightlora.runs.record import Record, metric_words

_TITLES = ("row", "task", "metric", "score", "seeds", "learn~ing rate", "warm- up", "trials", "adap~ters", "params")


def study_table(data: Mapping[str, Any], records: Sequence[Record]) -> Table:
    """The table of a study: of one task, all that its records tell; of several, one column of scores for each.

    Args:
        data: what ``sweep.json`` holds.
        records: of the reported runs.
    """
    return comparison_table(records) if len({cell["task"] for cell in data["cells"]}) == 1 else sweep_table(data)


def sweep_table(data: Mapping[str, Any]) -> Table:
    """The summary of a sweep: mean and sample standard deviation of the headline metric over the seeds that finished.

    Args:
        data: what ``sweep.json`` holds.

    Raises:
        ConfigError: it holds no cells.
    """
    if not data.get("cells"):
        raise ConfigError("the sweep's summary holds no cells; run the sweep again")
    rows = [_row(cell) for cell in data["cells"]]
    chosen = sorted({run["scored_on"]["rows"] for cell in data["cells"] for run in cell["trials"] if run["scored_on"]})
    notes = [*failures(data)]
    if chosen:
        seeds = ", ".join(map(str, data["selection_seeds"]))
        notes.insert(
            0, f"chosen on held-out training rows ({_range(chosen)} of them, seed {seeds}); scores: validation"
        )
    notes += [
        words for name in sorted({row["metric"] for row in rows} - {None}) if (words := metric_words(name)) != name
    ]
    return Table(
        caption="mean ± spread over seeds of the setting chosen for each task and row",
        titles=_TITLES,
        cells=tuple(_cells(row) for row in rows),
        notes=tuple(notes),
        rows=tuple(rows),
    )


def failures(data: Mapping[str, Any]) -> list[str]:
    """One line for every kind of failure, with how often it came; and for every cell of which nothing is known."""
    runs = [(kind, cell, run) for cell in data["cells"] for kind in ("trials", "runs") for run in cell[kind]]
    bad = Counter(
        f"{cell['task']}, {cell['row']}: {' '.join((run['error'] or run['status']).split())}"
        for _, cell, run in runs
        if run["status"] != "ok"
    )
    lines = [f"failed{f' ({times} runs)' if times > 1 else ''}: {text}" for text, times in bad.items()]
    return lines + [
        f"no setting worked, nothing is reported: {cell['task']}, {cell['row']}"
        for cell in data["cells"]
        if cell["chosen"] is None
    ]


def _row(cell: Mapping[str, Any]) -> dict[str, Any]:
    done = [run for run in cell["runs"] if run["status"] == "ok"]
    mean, spread = mean_and_spread([run["score"] for run in done])
    alive = [run["adapters"] for run in done]
    params = [run["params"] for run in done if run["params"] is not None]
    metrics = [run["metric"] for run in (*cell["runs"], *cell["trials"]) if run["metric"]]
    return {
        "row": cell["row"],
        "task": cell["task"],
        "metric": metrics[0] if metrics else None,
        "chosen": cell["chosen"],
        "score_mean": mean,
        "score_spread": spread,
        "seeds": sorted(run["seed"] for run in done),
        "ok": len(done),
        "total": len(cell["runs"]),
        "trials": len(cell["trials"]),
        "adapters_min": min(alive, default=None),
        "adapters_max": max(alive, default=None),
        "params": mean_and_spread(params)[0],
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    chosen = row["chosen"] or {}
    low, high = row["adapters_min"], row["adapters_max"]
    return (
        row["row"],
        row["task"],
        row["metric"] or MISSING,
        _score(row["score_mean"], row["score_spread"]),
        f"{row['ok']}/{row['total']}",
        *(f"{chosen[name]:g}" if name in chosen else MISSING for name in ("learning_rate", "warmup_steps")),
        str(row["trials"]),
        MISSING if not high else f"{low}" if low == high else f"{low}-{high}",
        human(row["params"], COUNT),
    )


def _score(mean: float | None, spread: float | None) -> str:
    """A mean with its spread.

    >>> _score(0.5, 0.25), _score(0.5, None), _score(None, None)
    ('0.5000 ± 0.2500', '0.5000', '-')
    """
    if mean is None:
        return MISSING
    return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"

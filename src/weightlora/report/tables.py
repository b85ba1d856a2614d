"""Many runs in one table. Numbers come from the records; nothing is measured again."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from weightlora.errors import ConfigError
from weightlora.report.units import BYTES, COUNT, FLOPS, MISSING, SECONDS, Scale, Unit, mean_and_spread, ratio
from weightlora.runs.record import EVAL_LOSS, Record, metric_words

BASELINE = "lora"
MORE_STEPS = 1.05  # times as many are worth a line
_BREAK = "~"  # where a heading's word may be broken when columns are side by side
_TITLES = {
    "method": "method",
    "seeds": "seeds",
    "score": "score",
    "eval_loss": "eval loss",
    "adapters": "adap~ters alive",
    "ranks": "ranks alive",
    "trainable_params": "train~able params",
    "kept_activation_bytes": "kept activ~ations",
    "flops_per_step": "FLOPs per step",
    "seconds_per_step": "time per step",
    "relative_time": f"time vs {BASELINE}",
}
PHASE_NUMBERS: tuple[tuple[str, str, Scale], ...] = (
    ("trainable parameters", "trainable_params", COUNT),
    ("kept activations", "kept_activation_bytes", BYTES),
    ("FLOPs per step", "flops_per_step", FLOPS),
    ("time per step", "seconds_per_step", SECONDS),
    ("peak memory", "peak_memory_bytes", BYTES),
)
"""What a phase cost: name, attribute of a phase, its units."""
_SCALES = {key: scale for _, key, scale in PHASE_NUMBERS if key in _TITLES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its caption, ready to be shown.

    Args:
        caption: what all rows have in common.
        titles: one heading per column; ``~`` marks where a word may be broken.
        cells: rows of text, each as long as ``titles``.
        notes: lines that belong below the table, such as the errors of failed runs.
        rows: the same rows as plain numbers, for machines.
    """

    caption: str
    titles: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for row in self.cells:
            if len(row) != len(self.titles):
                raise ConfigError(f"a table row has {len(row)} cells, but there are {len(self.titles)} columns")

    def to_markdown(self) -> str:
        """The table in Markdown: first column to the left, numbers to the right."""
        bars = ["---"] + ["---:"] * (len(self.titles) - 1)
        titles = [title.replace(_BREAK, "") for title in self.titles]
        lines = [_markdown_row(cells) for cells in (titles, bars, *self.cells)]
        notes = [f"- {_escape(note)}" for note in self.notes]
        blocks = [_escape(self.caption), "\n".join(lines), "\n".join(notes)]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_text(self, width: int = 100) -> str:
        """The table for a terminal of ``width`` columns: side by side where it fits, row by row where it does not."""
        for gap in (2, 1):
            body = self._grid(gap)
            if max(len(line) for line in body) <= width:
                break
        else:
            body = self._stacked(width)
        lines = [*textwrap.wrap(self.caption, max(width, 20)), "", *body]
        lines += [""] if self.notes else []
        for note in self.notes:
            lines += textwrap.wrap(note, max(width, 20), subsequent_indent="  ")
        return "\n".join(lines) + "\n"

    def _grid(self, gap: int) -> list[str]:
        """One line per row, under headings that are broken to one word per line."""
        words = [title.replace(_BREAK, "- ").split() for title in self.titles]
        depth = max(len(word) for word in words)
        heads = [tuple((([""] * (depth - len(word))) + word)[line] for word in words) for line in range(depth)]
        table = [*heads, *self.cells]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.titles))]
        lines = [
            (" " * gap)
            .join(
                cell.ljust(size) if column == 0 else cell.rjust(size)
                for column, (cell, size) in enumerate(zip(row, widths, strict=True))
            )
            .rstrip()
            for row in table
        ]
        lines.insert(depth, "-" * (sum(widths) + gap * (len(widths) - 1)))
        return lines

    def _stacked(self, width: int) -> list[str]:
        """One line per cell, for narrow terminals."""
        lines = []
        titles = [title.replace(_BREAK, "") for title in self.titles[1:]]
        indent = max(len(title) for title in titles) + 4
        for row in self.cells:
            lines += textwrap.wrap(row[0], max(width, 20))
            lines += [f"  {title}".ljust(indent) + cell for title, cell in zip(titles, row[1:], strict=True)]
        return lines

    def to_json(self) -> str:
        """Caption, rows as numbers and notes, as strict JSON; a number that is not finite is ``null``."""
        rows = [{key: _finite(value) for key, value in row.items()} for row in self.rows]
        content = {"caption": self.caption, "rows": rows, "notes": list(self.notes)}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _finite(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_table(records: Sequence[Record]) -> Table:
    """Methods side by side: one row per (method, preset), mean and spread over its seeds.

    The spread is the sample standard deviation, ``sqrt(sum((x - mean)^2) / (m - 1))`` over m finished runs. Costs
    are those of the final phase, averaged; adapters and ranks (of all adapters together) are those alive at the end.
    Runs that failed or did not finish are counted and named below the table, never averaged. Where one (method,
    preset) was run with several k or r, each of them gets its own row. Times are set against plain LoRA's only if all
    runs were made on one kind of machine.

    Raises:
        ConfigError: no records, or records of different tasks, models or metrics, which have no common mean.
    """
    if not records:
        raise ConfigError("there are no records to compare; name one or more run directories")
    for field in ("task", "model", "metric"):
        found = sorted({getattr(record, field) for record in records} - {""})  # "": it failed before it knew
        if len(found) > 1:
            raise ConfigError(f"a comparison needs runs of one {field}, not of {', '.join(found)}; compare them apart")
    rows = [_row(label, group) for label, group in groups(records).items()]
    finished = [record for record in records if record.status == "ok"]
    comparable = len({tuple(sorted(record.machine.items())) for record in finished}) <= 1
    for row in rows:
        # LoRA has no settings: whatever else a method changed, the row of the preset that it started from is its own.
        base = _baseline(rows, row["preset"].partition(",")[0]) if comparable else None
        seconds = row["seconds_per_step"]
        row["relative_time"] = seconds / base if seconds is not None and base else None
    metric = next((record.metric for record in records if record.metric), "score")
    presets = {record.preset for record in records}
    preset = f", preset {presets.pop()}" if len(presets) == 1 else ""
    units = {key: Unit.fit([row[key] for row in rows], scale) for key, scale in _SCALES.items()}
    columns = [key for key in _TITLES if key != EVAL_LOSS or (metric != EVAL_LOSS and any(row[key] for row in rows))]
    shown: dict[str, str] = {
        key: f"{title} ({units[key].sign})" if key in units and units[key].sign else title
        for key, title in _TITLES.items()
    } | {"score": metric}
    return Table(
        caption=f"{records[0].task}, {records[0].model}{preset}: {metric_words(metric)}, mean ± spread over seeds",
        titles=tuple(shown[key] for key in columns),
        cells=tuple(tuple(_cell(key, row, units) for key in columns) for row in rows),
        notes=_notes(records, rows, comparable) + _beside_lora(rows, metric),
        rows=tuple(rows),
    )


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the label of their row, in order of first appearance."""
    one_preset = len({record.preset for record in records}) == 1
    settings: dict[tuple[str, str], set[tuple[int | None, int | None]]] = {}
    for record in records:
        found = settings.setdefault((record.method, record.preset), set())
        if record.status == "ok":  # a run that failed early may not know its k
            found.add((record.k, record.r))
    rows: dict[str, list[Record]] = {}
    for record in records:
        label = record.method if one_preset else f"{record.method} ({record.preset})"
        if len(settings[record.method, record.preset]) > 1:
            label += f" k={MISSING if record.k is None else record.k} r={MISSING if record.r is None else record.r}"
        rows.setdefault(label, []).append(record)
    return rows


def _row(label: str, group: Sequence[Record]) -> dict[str, Any]:
    """One row as numbers."""
    done = [record for record in group if record.status == "ok"]
    scores = [record.score for record in done if record.score is not None]
    alive = [len(record.kept) for record in done]
    ranks = [sum(entry.rank for entry in record.kept) for record in done]
    mean, spread = mean_and_spread(scores)
    return {
        "label": label,
        "method": group[0].method,
        "preset": group[0].preset,
        "k": group[0].k if len({record.k for record in group}) == 1 else None,
        "seeds": sorted(record.seed for record in done),
        "ok": len(done),
        "failed": sum(record.status == "failed" for record in group),
        "total": len(group),
        "score_mean": mean,
        "score_spread": spread,
        EVAL_LOSS: mean_and_spread([r.metrics[EVAL_LOSS] for r in done if EVAL_LOSS in r.metrics])[0],
        "adapters_min": min(alive, default=None),
        "adapters_max": max(alive, default=None),
        "ranks_min": min(ranks, default=None),
        "ranks_max": max(ranks, default=None),
        "n_adapters": max((record.n_adapters for record in done), default=None),
        "trainable_params": mean_and_spread([record.trainable_params["final"] for record in done])[0],
        **{key: _final(done, key) for key in _SCALES if key != "trainable_params"},
        "steps": mean_and_spread([sum(phase.steps for phase in record.phases) for record in done])[0],
        "flops": _all_flops(done),
    }


def _final(records: Sequence[Record], key: str) -> float | None:
    """The mean of a number of the final phases; None unless every run has it."""
    found = [getattr(record.final_phase, key, None) for record in records]
    known = [value for value in found if value is not None]
    return mean_and_spread(known)[0] if len(known) == len(found) else None


def _all_flops(records: Sequence[Record]) -> float | None:
    """The mean of the operations of whole runs; None unless every phase of every run has them."""
    phases = [phase for record in records for phase in record.phases]
    known = [phase.steps * phase.flops_per_step for phase in phases if phase.flops_per_step is not None]
    return sum(known) / len(records) if known and len(known) == len(phases) else None


def _baseline(rows: Sequence[dict[str, Any]], preset: str) -> float | None:
    """Plain LoRA's seconds per step: those of the same preset, else of the first row that has any."""
    found = [row for row in rows if row["method"] == BASELINE and row["seconds_per_step"]]
    found.sort(key=lambda row: row["preset"] != preset)  # stable: only the same preset moves to the front
    return found[0]["seconds_per_step"] if found else None


def _cell(key: str, row: dict[str, Any], units: dict[str, Unit]) -> str:
    """One number, or one word, for people."""
    words: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: str(row["label"]),
        "seeds": lambda row: f"{row['ok']}/{row['total']}" + (f", {row['failed']} failed" if row["failed"] else ""),
        "score": _score_cell,
        EVAL_LOSS: lambda row: MISSING if row[EVAL_LOSS] is None else f"{row[EVAL_LOSS]:.4f}",
        "adapters": lambda row: _alive_cell(row, "adapters", f"/{row['n_adapters']}"),
        "ranks": lambda row: _alive_cell(row, "ranks"),
        "relative_time": lambda row: MISSING if row["relative_time"] is None else f"{row['relative_time']:.2f}x",
    }
    return words[key](row) if key in words else units[key].cell(row[key])


def _score_cell(row: dict[str, object]) -> str:
    if row["failed"] == row["total"]:
        return "failed"
    if row["score_mean"] is None:
        return MISSING
    spread = MISSING if row["score_spread"] is None else f"{row['score_spread']:.4f}"
    return f"{row['score_mean']:.4f} ± {spread}"


def _alive_cell(row: dict[str, object], what: str, of: str = "") -> str:
    """How many are left at the end: one number, or the least and the most over the seeds."""
    if not row["n_adapters"]:
        return MISSING
    low, high = row[f"{what}_min"], row[f"{what}_max"]
    return f"{low if low == high else f'{low}-{high}'}{of}"


def _notes(records: Sequence[Record], rows: Sequence[dict[str, Any]], comparable: bool) -> tuple[str, ...]:
    """What a reader must know before trusting the table."""
    notes = []
    for record in records:
        run = f"{record.method} ({record.preset}), seed {record.seed}"
        if record.status == "failed":
            notes.append(f"failed: {run}: {' '.join((record.error or 'no reason recorded').split())}")
        elif record.status == "running":
            notes.append(f"not finished: {run}")
        elif record.score is None:
            notes.append(f"no {record.metric} recorded: {run}; the mean is over the others")
    unmet = {(record.method, record.preset): record.unmet for record in records[::-1] if record.unmet}
    notes += [f"{method} ({preset}): {why}" for (method, preset), why in list(unmet.items())[::-1]]
    for row in rows:
        twice = [str(seed) for seed, times in Counter(row["seeds"]).items() if times > 1]
        if twice:
            notes.append(f"{row['label']}: several runs of seed {', '.join(twice)}; the spread is not over seeds alone")
    phases = [record.final_phase for record in records if record.status == "ok" and record.final_phase]
    sizes = sorted({phase.micro_batch for phase in phases if phase.micro_batch is not None})
    if len(sizes) > 1:
        notes.append(f"kept activations are per micro-batch, and micro-batches differ: {', '.join(map(str, sizes))}")
    if not comparable:
        notes.append("the runs come from different kinds of machine: their times are not comparable")
    return tuple(notes)


def _beside_lora(rows: Sequence[dict[str, Any]], metric: str) -> tuple[str, ...]:
    """The answer in words, where one method stands beside plain LoRA."""
    if len(rows) != 2 or [row["method"] for row in rows].count(BASELINE) != 1:
        return ()
    lora, other = sorted(rows, key=lambda row: row["method"] != BASELINE)
    differences = [
        f"{name} {other[key] - lora[key]:+.4f}"
        for name, key in ((metric, "score_mean"), (EVAL_LOSS, EVAL_LOSS))
        if name and None not in (lora[key], other[key])
    ]
    costs = [(_TITLES[key].replace(_BREAK, ""), ratio(lora[key], other[key])) for key in _SCALES]
    said = [*dict.fromkeys(differences), *(f"{name} {change}" for name, change in costs if change != MISSING)]
    notes = [f"{other['label']} beside {BASELINE}: {', '.join(said)}"] if said else []
    if lora["flops"] and other["flops"] and lora["steps"] == other["steps"]:
        steps = int(other["steps"] * lora["flops"] / other["flops"])
        if steps >= other["steps"] * MORE_STEPS:
            notes.append(
                f"for as many FLOPs as {BASELINE} took, {other['label']} can take {steps} steps in place of "
                f"{other['steps']:.0f}"
            )
    return tuple(notes)

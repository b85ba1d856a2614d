"""From run files to what the page shows: words, tables and pictures, in the page's order. Plain data, no markup."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Sequence

from weightlora.report import charts, contrasts, grids, reproduce
from weightlora.report.layout import layout
from weightlora.report.picture import Picture
from weightlora.report.runfiles import RunFiles
from weightlora.report.stability import Stability, stability
from weightlora.report.summary import phase_rows
from weightlora.report.tables import PHASE_NUMBERS, Table, comparison_table
from weightlora.report.units import BYTES, COUNT, MISSING, Unit, human, ratio
from weightlora.runs.record import Record, metric_words

STATUS = {"ok": "finished", "failed": "failed", "running": "not finished"}
# What keeps a page of fifty runs small: how many points the paths of all runs' gates, and of their losses, may have
# together; and up to how many adapters in all each mark says its value when pointed at.
GATE_POINTS, LOSS_POINTS, TITLED_CELLS = 40_000, 5_000, 2_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    name: str
    value: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunView:
    """One run as the page shows it. ``rows``: tables as rows of cells, the first row its heading."""

    id: str
    title: str
    place: str
    status: str
    status_words: str
    headline: str
    warning: str
    resume: str
    error: str
    why: str
    tiles: tuple[Tile, ...]
    pictures: tuple[Picture, ...]
    absent: tuple[str, ...]
    phases: tuple[tuple[str, ...], ...]
    predictions: tuple[tuple[str, ...], ...]
    kept: tuple[tuple[str, ...], ...]
    command: str
    alone: str
    lora: str
    facts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonView:
    """Runs of one task, model and metric, side by side."""

    id: str
    title: str
    lead: str
    table: Table
    heads: tuple[str, ...]
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    frequencies: tuple[Picture, ...]
    stability: tuple[tuple[str, ...], ...]
    measured: tuple[Stability, ...]


def run_views(runs: Sequence[RunFiles]) -> tuple[RunView, ...]:
    """Every run, in order; the more runs there are, the fewer points each one's curves have."""
    return tuple(_run_view(run, f"run-{index}", runs) for index, run in enumerate(runs, start=1))


def _run_view(run: RunFiles, id: str, runs: Sequence[RunFiles]) -> RunView:
    record, log = run.record, run.read_log()
    cells = sum(len(other.record.adapters) for other in runs)
    gates, losses = (max(least, most // len(runs)) for least, most in ((800, GATE_POINTS), (100, LOSS_POINTS)))
    drawn = {
        "selection": grids.selection_picture(record) if record.adapters else None,
        "gates": charts.omega_picture(record, log, min(gates, 6000)),
        "scores": charts.score_picture(record),
        "frontier": charts.frontier_picture(record),
        "loss": charts.loss_picture(record, log, min(losses, 400)),
        "metric": charts.metric_picture(record, log),
        "costs": charts.cost_picture(record),
    }
    return RunView(
        id=id,
        title=f"{record.method} ({record.preset})",
        place=str(run.path),
        status=record.status,
        status_words=STATUS[record.status],
        headline=_headline(record, alone=len({(r.record.task, r.record.model) for r in runs}) == 1),
        warning=_warning(run),
        resume="" if record.status == "ok" else shlex.join(["weightlora", "resume", str(run.path)]),
        error=run.error,
        why=" ".join(record.why.split()),
        tiles=_tiles(record),
        pictures=tuple(p if cells <= TITLED_CELLS else p.plain() for p in drawn.values() if p is not None),
        absent=tuple(_absent(record, drawn)),
        phases=_phases(record),
        predictions=_predictions(record),
        kept=_kept(record),
        command=reproduce.started_with(record),
        alone=reproduce.alone(record),
        lora=reproduce.lora_config(record, run.adapter_config),
        facts=_facts(record),
    )


def _headline(record: Record, *, alone: bool) -> str:
    """What stands beside the run's name while it is folded: seed, score, and how much was kept."""
    words = [f"seed {record.seed}"] if alone else [record.task, record.model, f"seed {record.seed}"]
    if record.score is not None:
        words.append(f"{record.metric} {record.score:.4f}")
    if record.n_adapters and record.status == "ok":
        words.append(f"{len(record.kept)} of {record.n_adapters} adapters")
    return ", ".join(words)


def _warning(run: RunFiles) -> str:
    """What a reader must know first about a run that did not end well."""
    record = run.record
    if record.status == "ok":
        return ""
    so_far = (
        f"What is shown comes from the checkpoint at step {run.checkpoint}"
        + (f" of {record.max_steps}." if record.max_steps else ".")
        if run.checkpoint is not None
        else "It left no checkpoint, so there are no curves."
    )
    if record.status == "failed":
        return f"This run failed: {record.error or 'no reason is recorded'}. {so_far}"
    return f"This run has not finished: it is going on, or was stopped. {so_far}"


def _tiles(record: Record) -> tuple[Tile, ...]:
    tiles = []
    if record.score is not None:
        others = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items() if name != record.metric)
        tiles.append(Tile(name=record.metric, value=f"{record.score:.4f}", detail=others))
    if record.n_adapters and record.kept:
        ranks = sorted({entry.rank for entry in record.kept})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        tiles.append(Tile(name="adapters kept", value=f"{len(record.kept)} of {record.n_adapters}", detail=rank))
    for name, key, scale in PHASE_NUMBERS:
        values = [getattr(phase, key) for phase in record.phases]
        if not values or values[-1] is None:
            continue
        before = values[0] if len(values) > 1 else None
        detail = "" if before is None else f"{ratio(before, values[-1])}: {human(before, scale)} before the seam"
        tiles.append(Tile(name=name, value=human(values[-1], scale), detail=detail))
    return tuple(tiles)


def _absent(record: Record, drawn: dict[str, Picture | None]) -> Iterable[str]:
    """A sentence for each picture that a reader may look for in vain."""
    if drawn["selection"] is None:
        full = record.status == "ok" and not record.n_adapters
        yield "No adapters: every weight trained." if full else "No selection is recorded."
    elif drawn["gates"] is None and record.seam_step:
        yield "No paths of gates: this run's gates were not trained, or not logged."
    if drawn["loss"] is None:
        yield "No loss curve: the run's directory holds no log of the trainer."
    elif drawn["metric"] is None:
        yield f"No curve of {record.metric}: it was taken once at most (--eval-strategy steps takes it on the way)."


def _phases(record: Record) -> tuple[tuple[str, ...], ...]:
    rows = phase_rows(record.phases) if record.phases else []
    columns = len(record.phases) + (2 if len(record.phases) > 1 else 1)  # one phase has nothing to be set against
    return tuple(tuple(row[:columns]) for row in rows)


def _predictions(record: Record) -> tuple[tuple[str, ...], ...]:
    """Predicted beside measured, a row per phase and number; the rows after a heading, or nothing."""
    phases = {phase.name: phase for phase in record.phases}
    scales = {key: scale for _, key, scale in PHASE_NUMBERS}
    rows = []
    for phase, numbers in record.predicted.items():
        for key, predicted in numbers.items():
            scale = scales.get(key, BYTES if key.endswith("bytes") else COUNT)
            measured = getattr(phases.get(phase), key, None)
            unit = Unit.fit([predicted, measured], scale)
            off = f"{predicted / measured - 1:+.1%}" if measured else MISSING
            rows.append((phase, key.replace("_", " "), unit.text(predicted), unit.text(measured), off))
    return (("phase", "number", "predicted", "measured", "prediction is off by"), *rows) if rows else ()


def _kept(record: Record) -> tuple[tuple[str, ...], ...]:
    """The survivors, with a column for whatever tells them apart: omega, score, rank."""
    scores = {adapter.name: adapter.score for adapter in record.adapters}
    places = {place.adapter.name: place.short for place in layout(record.adapters)}
    columns = {
        "omega": [f"{entry.omega:.4g}" if math.isfinite(entry.omega) else MISSING for entry in record.kept],
        "score": [MISSING if (s := scores.get(entry.name)) is None else f"{s:.4g}" for entry in record.kept],
        "rank": [str(entry.rank) for entry in record.kept],
    }
    telling = {head: cells for head, cells in columns.items() if len(set(cells)) > 1}
    names = [places.get(entry.name, entry.name) for entry in record.kept]
    rows = zip(names, *telling.values(), strict=True)
    return (("adapter", *telling), *rows) if names else ()


def _facts(record: Record) -> tuple[tuple[str, str], ...]:
    steps = MISSING if record.max_steps is None else str(record.max_steps)
    seam = "none" if record.seam_step is None else f"after step {record.seam_step}"
    budget = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in record.budget.items())
    return (
        ("task", record.task),
        ("model", record.model),
        ("seed", str(record.seed)),
        ("steps", steps),
        ("seam", seam),
        *((("adapter parameters", budget),) if budget else ()),
        ("machine", ", ".join(f"{key} {value}" for key, value in record.machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in record.versions.items())),
    )


def comparison_views(runs: Sequence[RunFiles]) -> tuple[ComparisonView, ...]:
    """One comparison per task, model and metric that has two runs or more."""
    together: dict[tuple[str, str, str], list[Record]] = {}
    for run in runs:
        together.setdefault((run.record.task, run.record.model, run.record.metric), []).append(run.record)
    several = [records for records in together.values() if len(records) > 1]
    return tuple(_comparison(records, f"comparison-{index}") for index, records in enumerate(several, start=1))


def _comparison(records: Sequence[Record], id: str) -> ComparisonView:
    table, measured = comparison_table(records), stability(records)
    pictures = contrasts.spread_picture(records, table), contrasts.overlap_picture(measured)
    return ComparisonView(
        id=id,
        title=f"{records[0].task}, {records[0].model}",
        lead=f"{metric_words(records[0].metric)}: mean ± sample standard deviation over seeds."
        " Costs are those of the final phase.",
        table=table,
        heads=tuple(title.replace("~", "") for title in table.titles),
        notes=(*table.notes, *_unequal(records)),
        pictures=tuple(picture for picture in pictures if picture is not None),
        frequencies=tuple(grids.frequency_picture(s.label, s.adapters, s.counts, s.runs) for s in measured),
        stability=_stability_rows(measured),
        measured=tuple(measured),
    )


def _stability_rows(measured: Sequence[Stability]) -> tuple[tuple[str, ...], ...]:
    rows = [
        {
            "method": entry.label,
            "runs": str(entry.runs),
            "kept": "-".join(map(str, dict.fromkeys(entry.sizes))) + f" of {entry.n}",
            "shared by two seeds": f"{entry.shared:.2f}",
            "by random sets": f"{entry.random_shared:.2f}",
            "overlap": f"{entry.overlap:.0%}",
            "of random sets": f"{entry.random_overlap:.0%}",
            "kept by all": str(sum(count == entry.runs for count in entry.counts.values())),
        }
        for entry in measured
    ]
    return (tuple(rows[0]), *(tuple(row.values()) for row in rows)) if rows else ()


def _unequal(records: Sequence[Record]) -> list[str]:
    """Settings beside method and seed in which the runs of a comparison differ: it is not only the methods then."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        training = record.config.get("training")
        settings = {**record.config, **(training if isinstance(training, dict) else {})}
        for key, value in settings.items():
            if key not in ("method", "preset", "settings", "seed", "training"):
                values.setdefault(key, {})[str(value)] = None
    differing = {key: list(found) for key, found in values.items() if len(found) > 1}
    return [f"the runs differ in {key}: {', '.join(sorted(found))}" for key, found in sorted(differing.items())]

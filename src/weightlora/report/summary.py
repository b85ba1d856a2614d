"""One run in a few lines, and what its phases cost in columns. Numbers come from the record."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from weightlora.report.layout import layout
from weightlora.report.tables import PHASE_NUMBERS
from weightlora.report.units import BYTES, MISSING, SECONDS, Unit, human, ratio
from weightlora.runs.record import PhaseResult, Record


def run_summary(record: Record) -> str:
    """One run in a few lines: score, adapters kept, and what each phase cost, before the seam and after it."""
    lines = [f"{record.method} ({record.preset}) on {record.task}, {record.model}, seed {record.seed}: {record.status}"]
    if record.error:
        lines.append(f"  error: {' '.join(record.error.split())}")
    if record.score is not None:
        others = ", ".join(f"{key} {value:.4f}" for key, value in record.metrics.items() if key != record.metric)
        lines.append(f"  {record.metric}: {record.score:.4f}" + (f" ({others})" if others else "") + _rows(record))
    if record.n_adapters:
        kept = f"  adapters kept: {len(record.kept)} of {record.n_adapters}: {', '.join(_kept_names(record))}"
        lines += textwrap.wrap(kept.rstrip(": "), 100, subsequent_indent="    ")
    if record.why:
        lines += textwrap.wrap(f"  why: {' '.join(record.why.split())}", 100, subsequent_indent="    ")
    if record.phases:
        lines += [""] + [f"  {line}".rstrip() for line in _phase_lines(record.phases)]
    if len(record.phases) > 1:
        lines += ["", f"  {_warmup_share(record.phases)}"]
    return "\n".join(lines) + "\n"


def _rows(record: Record) -> str:
    """The rows behind the score: how many judged, and how many there were to train on."""
    where = record.scored_on
    if "train_rows" not in where:
        return ""
    kind = "validation" if where["split"] == "validation" else "held-out"
    return f", on {where['rows']} {kind} rows; {where['train_rows']} training rows"


def _kept_names(record: Record) -> list[str]:
    """The survivors' short names in the record's order: at most a dozen of them and the count of the others."""
    short = {place.adapter.name: place.short for place in layout(record.adapters)}
    names = [short.get(entry.name) or ".".join(entry.name.split(".")[-2:]) for entry in record.kept]
    return names if len(names) <= 12 else [*names[:12], f"and {len(names) - 12} more"]


def phase_rows(phases: Sequence[PhaseResult]) -> list[list[str]]:
    """A heading, then one row per number: a column per phase and, with two or more, the last against the first.

    >>> phase_rows([])[0]
    ['', '']
    """
    several = len(phases) > 1
    table = [["", *(phase.name for phase in phases), "change" if several else ""]]
    table.append(["steps", *(str(phase.steps) for phase in phases), ""])
    table.append(["micro-batch", *(_batch(phase) for phase in phases), ""])
    for name, key, scale in PHASE_NUMBERS:
        values = [getattr(phase, key) for phase in phases]
        if any(value is not None for value in values):
            unit = Unit.fit(values, scale)
            change = ratio(values[0], values[-1]) if several else ""
            table.append([name, *(unit.text(value) for value in values), change])
    return table


def _phase_lines(phases: Sequence[PhaseResult]) -> list[str]:
    """The phases' numbers in columns."""
    table = phase_rows(phases)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def _batch(phase: PhaseResult) -> str:
    if phase.micro_batch is None:
        return MISSING
    return f"{phase.micro_batch} x {phase.accumulation}" if phase.accumulation else str(phase.micro_batch)


def _warmup_share(phases: Sequence[PhaseResult]) -> str:
    """What the phase before the seam took of the whole, since it is the price of the selection."""
    first, steps, seconds = phases[0], sum(phase.steps for phase in phases), sum(phase.seconds for phase in phases)
    text = f"{first.name} took {first.steps} of {steps} steps"
    if seconds:
        text += f" and {first.seconds / seconds:.0%} of the time ({human(first.seconds, SECONDS)})"
    peaks = [phase.kept_activation_bytes for phase in phases if phase.kept_activation_bytes is not None]
    if first.kept_activation_bytes is not None and first.kept_activation_bytes >= max(peaks):
        text += f"; it sets the run's peak of {human(first.kept_activation_bytes, BYTES)} kept activations"
    return text

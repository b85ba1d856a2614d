"""What a run came to and what it cost, as a section of an adapter's model card."""

from __future__ import annotations

from weightlora.report.summary import phase_rows
from weightlora.report.tables import Table
from weightlora.runs.record import Record


def card_section(record: Record) -> str:
    """Markdown with the run's metrics and a table of its phases; "" where it has neither.

    The numbers are the record's: bytes and FLOPs counted, times measured on one machine.
    """
    lines = ["## What the run measured", ""]
    if record.metrics:
        listed = ", ".join(f"{_code(name)} {value:.4f}" for name, value in record.metrics.items())
        lines += [f"On the validation rows of {_code(record.task)}, seed {record.seed}: {listed}.", ""]
    if record.phases:
        heading, *rows = phase_rows(record.phases)
        cells = tuple(tuple(row) for row in rows)
        table = Table(caption="", titles=tuple(heading), cells=cells, notes=(), rows=())
        lines += ["Bytes and FLOPs are counted, times are of the machine it ran on.", "", table.to_markdown()]
    return "\n".join(lines).rstrip() + "\n" if len(lines) > 2 else ""


def _code(text: str) -> str:
    """A code span, which no word can leave."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"

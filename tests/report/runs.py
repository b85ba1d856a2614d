"""Run directories as runs leave them, with made-up but consistent numbers: records, logs, adapters, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from weightlora.runs.record import Record

HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=http://evil.invalid/x onerror="window.pwned=1">',
    "'onmouseover=window.pwned=1 x='",
    "</title></style></svg></pre><script>window.pwned=1</script>",
    "{{ 7 * 7 }}{% raise %}]]>&lt;b&gt;<!--",
    "javascript:window.pwned=1//\u202e\u0000",
)


def log_of(record: Record, entries: int = 24, last: int | None = None) -> list[dict[str, Any]]:
    """A trainer's log: losses all along, the metric now and then, every gate until the seam."""
    rng, steps = random.Random(record.seed), last or record.max_steps or 1
    gates = {adapter.name: 1.0 for adapter in record.adapters}
    log: list[dict[str, Any]] = []
    for number in range(1, entries + 1):
        step = max(1, steps * number // entries)
        if record.seam_step is not None and step <= record.seam_step:
            gates = {name: gate + rng.gauss(0, 0.08) for name, gate in gates.items()}
            log.append({f"omega/{name}": gate for name, gate in gates.items()} | {"omega/alive": 9.0, "step": step})
        log.append({"loss": 2 / number + rng.random() / 5, "learning_rate": 1e-3, "epoch": 0.1, "step": step})
        if number % 4 == 0:
            scores = {f"eval_{record.metric}": 0.8 + rng.random() / 10, "eval_loss": 1 / number}
            log.append(scores | {"eval_runtime": 1.0, "step": step})
    return log


def write_run(folder: Path, record: Record, *, log: list[dict[str, Any]] | None = None, **more: Any) -> Path:
    """A run directory that ended with ``record``; ``more`` are keys that a later release adds to the record."""
    folder.mkdir(parents=True)
    data = json.loads(record.to_json()) | more
    (folder / "record.json").write_text(json.dumps(data), encoding="utf-8")
    if record.status == "failed":
        lines = ["Traceback (most recent call last):", *(f"  line {n}" for n in range(90)), str(record.error)]
        (folder / "error.txt").write_text("\n".join(lines), encoding="utf-8")
    if record.status == "ok" and record.adapters:
        manifest = {"data": {"log": log_of(record) if log is None else log}}
        (folder / "weightlora.json").write_text(json.dumps(manifest), encoding="utf-8")
        (folder / "adapter").mkdir()
        names = [entry.name for entry in record.kept]
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": names, "lora_dropout": 0.05}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_checkpoint(folder: Path, record: Record, step: int, *, selected: bool) -> Path:
    """A checkpoint of an unfinished run at ``step``, as the trainer and the library leave it.

    Args:
        folder: the run directory.
        record: the run as it would be if it had ended.
        step: optimizer steps done.
        selected: the seam is past: the manifest holds the selection and what warm-up cost.
    """
    place = folder / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    state = {"global_step": step, "max_steps": record.max_steps, "log_history": log_of(record, 10, last=step)}
    (place / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    choices = [
        {"name": a.name, "kept": a.kept, "omega": a.omega, "score": a.score, "rank": 8, "scale": 4.0}
        for a in record.adapters
    ]
    selection = {"step": record.seam_step, "why": record.why, "choices": choices}
    phases = [dataclasses.asdict(record.phases[0])] if selected else []
    manifest = {"selection": selection if selected else None, "data": {"phases": phases, "seconds": 1.0}}
    (place / "weightlora.json").write_text(json.dumps(manifest), encoding="utf-8")
    return place


def unfinished(record: Record, status: str = "running", error: str | None = None) -> Record:
    """The record of the same run before its end."""
    return dataclasses.replace(
        record, status=status, error=error, kept=(), adapters=(), trainable_params={}, metrics={}, phases=(),
        seam_step=None, why="", k=None,
    )  # type: ignore[arg-type]  # fmt: skip


def hostile(record: Record) -> Record:
    """A finished run in which every word that somebody else chose is an attack."""
    names = {a.name: f"layer.{n}.{HOSTILE[n % len(HOSTILE)]}{n}" for n, a in enumerate(record.adapters)}
    adapters = tuple(
        dataclasses.replace(a, name=names[a.name], kind=names[a.name].rpartition(".")[2]) for a in record.adapters
    )
    kept = tuple(dataclasses.replace(entry, name=names[entry.name]) for entry in record.kept)
    words = "\n".join(HOSTILE)
    return dataclasses.replace(
        record, method=HOSTILE[0], preset=HOSTILE[1], task=HOSTILE[2], model=HOSTILE[3], metric=HOSTILE[4],
        metrics={HOSTILE[4]: 0.5, HOSTILE[5]: 0.25}, adapters=adapters, kept=kept, why=words,
        argv=("weightlora", *HOSTILE), versions={HOSTILE[0]: HOSTILE[1]}, machine={HOSTILE[3]: HOSTILE[2]},
        config={"task": HOSTILE[0], "model": HOSTILE[1], "method": HOSTILE[3], "training": {HOSTILE[2]: HOSTILE[4]}},
    )  # fmt: skip

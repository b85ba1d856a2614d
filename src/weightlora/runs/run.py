"""One run's life: build, train, evaluate, export, record. All in one directory, from which a killed run goes on."""

from __future__ import annotations

import contextlib
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, set_seed

from weightlora.core.budget import parse_params
from weightlora.errors import CheckpointError, WeightLoRAError
from weightlora.files import disk_is_full, leftovers, new_folder, sweep, write_text
from weightlora.graft.adapters import adapters, block_of
from weightlora.graft.manifest import MANIFEST, Manifest
from weightlora.graft.selection import Selection
from weightlora.graft.tuners import tuned_layers
from weightlora.methods import AdapterMethod, Method, PlainMethod, TunerMethod
from weightlora.runs.build import Parts, build, make_trainer, scored_on, tell_scored_on
from weightlora.runs.lock import INSIDE, alone, refuse_busy
from weightlora.runs.outcome import (
    ADAPTER,
    MODEL,
    SELECTION,
    answer_in_own_units,
    batch_to_compare,
    evaluate,
    on_whole_base,
    write_result,
)
from weightlora.runs.progress import Progress
from weightlora.runs.record import AdapterScore, Kept, Record, collect_versions, machine
from weightlora.runs.spec import CONFIG, RunSpec
from weightlora.runs.together import follows
from weightlora.training import FitResult, fit
from weightlora.training.checkpoint import begun_steps
from weightlora.training.processes import wait

RECORD = "record.json"
ERROR = "error.txt"
PICTURE = "selection.png"
SELECT = "select.json"
# What a run writes under a temporary name first.
WRITTEN = (CONFIG, RECORD, ADAPTER, MODEL, SELECTION, MANIFEST, ERROR, PICTURE)


def train(
    spec: RunSpec, folder: str | Path, *, overwrite: bool = False, argv: Sequence[str] = (), quiet: bool = False
) -> Record:
    """Start a run in `folder`.

    Returns:
        Its record; ``status`` is "failed" where training itself failed (``error.txt`` then holds the whole story).

    Raises:
        WeightLoRAError: the settings cannot work, or the folder is taken. Nothing was written.
    """
    folder = Path(folder)
    if follows():
        return _follow(spec, folder, resume=False, argv=argv)
    refuse_busy(folder)
    _check_folder(folder, overwrite)
    parts = build(spec)
    with alone(folder):
        _check_folder(folder, overwrite)  # loading took a while
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, *WRITTEN)
        spec.save(folder)
        try:
            return _live(parts, spec, folder, resume=False, argv=argv, quiet=quiet)
        except WeightLoRAError:
            shutil.rmtree(folder)  # it could not start
            raise


def resume(folder: str | Path, *, argv: Sequence[str] = (), quiet: bool = False) -> Record:
    """Go on with a run that was interrupted, from its latest whole checkpoint, to the same final adapter.

    Raises:
        CheckpointError: no run directory, or the run is finished (then its record is there to read).
    """
    folder = Path(folder)
    spec = RunSpec.load(folder)
    if follows():
        return _follow(spec, folder, resume=True, argv=argv)
    refuse_busy(folder)
    if finished(folder):
        sweep(folder, *WRITTEN)  # of a process that was killed after its last word
        raise CheckpointError(f"{folder} holds a finished run; there is nothing to resume (see {folder / RECORD})")
    with alone(folder):
        parts = build(spec, begun_steps(folder / "checkpoints"))
        sweep(folder, *WRITTEN)
        sweep(folder / "checkpoints", "seam-*")
        return _live(parts, spec, folder, resume=True, argv=argv, quiet=quiet)


def finished(folder: str | Path) -> bool:
    """Whether a run in `folder` ended well."""
    record = Path(folder) / RECORD
    return record.is_file() and Record.read(record).status == "ok"


def select(spec: RunSpec, folder: str | Path, *, overwrite: bool = False, quiet: bool = False) -> Selection:
    """Run only until the selection is made; write ``selection.json`` and a ``LoraConfig`` for any other trainer.

    Raises:
        WeightLoRAError: as :func:`train`.
    """
    folder = Path(folder)
    refuse_busy(folder)
    _check_folder(folder, overwrite)
    parts = build(spec)
    if not isinstance(parts.method, AdapterMethod):
        raise WeightLoRAError(f"method {spec.method.name!r} selects nothing; use weightlora, random, top or gradient")
    with alone(folder), new_folder(folder) as temporary, _progress(spec, quiet) as progress:
        _check_folder(folder, overwrite)
        trainer = make_trainer(parts, spec, temporary, progress)
        set_seed(spec.training.seed)
        result = fit(
            trainer,
            parts.method,
            micro_batch=spec.training.micro_batch,
            final_micro_batch=spec.training.final_micro_batch,
            measure=False,
            select_only=True,
            engine=spec.training.engine,  # type: ignore[arg-type]  # checked by the configuration
        )
        assert result.selection is not None
        result.selection.save(temporary / SELECTION)
        result.selection.lora_config(
            task_type=parts.task_type, lora_dropout=spec.model.dropout, modules_to_save=list(parts.loaded.heads)
        ).save_pretrained(str(temporary))
        spec.save(temporary, SELECT)  # not as a run's own file: there is no run to resume
        shutil.rmtree(temporary / "checkpoints", ignore_errors=True)
    return result.selection


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give --out a folder")
    if not set(folder.iterdir()) - {*leftovers(folder, *WRITTEN), folder / INSIDE}:
        return
    # A config.json alone proves nothing: every saved model has one. What is not ours is never removed.
    ours = {name: RunSpec.is_one(folder / name) for name in (CONFIG, SELECT)}
    if overwrite and any(ours.values()):
        return
    if ours[SELECT]:
        raise CheckpointError(f"{folder} already holds a selection; choose another --out, or --overwrite it")
    if ours[CONFIG] and finished(folder):
        raise CheckpointError(f"{folder} already holds a finished run; choose another --out, or --overwrite it")
    if ours[CONFIG]:
        raise CheckpointError(
            f"{folder} holds an unfinished run; go on with `weightlora resume {folder}`, or --overwrite it"
        )
    raise CheckpointError(f"{folder} is not empty and holds no run, so nothing in it is replaced; choose another --out")


@contextlib.contextmanager
def _progress(spec: RunSpec, quiet: bool) -> Iterator[list[TrainerCallback]]:
    """The callback that shows progress, in a list for the trainer; the terminal is left tidy."""
    bar = Progress(f"{spec.method.name} on {spec.task.name}")
    try:
        yield [] if quiet else [bar]
    finally:
        bar.close()


@contextlib.contextmanager
def _recorded(recording: _Recording) -> Iterator[None]:
    """Keep ``record.json`` true while a run lives: "running" on entry; on an exception "failed", traceback beside it.

    A mistake of the user's that shows before the first step leaves the folder as it was; it alone is raised. What
    interrupts the process leaves the run "running", to be resumed.
    """
    folder = recording.folder
    before = {path: path.read_text(encoding="utf-8") for path in (folder / RECORD, folder / ERROR) if path.is_file()}
    (folder / ERROR).unlink(missing_ok=True)
    recording.record.write(folder / RECORD)
    try:
        yield
    except Exception as error:  # whatever ends a run is in its record
        if isinstance(error, WeightLoRAError) and not recording.began:
            (folder / RECORD).unlink()
            for path, text in before.items():
                write_text(path, text)
            raise
        line = f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        if disk_is_full(error):
            line = f"no space to write into {folder}; free some, then `weightlora resume {folder}` goes on"
        recording.record = replace(recording.record, status="failed", error=line)
        try:
            recording.record.write(folder / RECORD)
            write_text(folder / ERROR, traceback.format_exc())
        except OSError as full:
            # The record stays "running", as a killed process leaves it; what is said is said by the caller.
            raise full from error
    else:
        recording.record.write(folder / RECORD)


@dataclass
class _Recording:
    """A run's record as far as it is known, its folder, and its trainer once there is one."""

    record: Record
    folder: Path
    trainer: Trainer | None = None

    @property
    def began(self) -> bool:
        """Whether a step has been done."""
        return self.trainer is not None and self.trainer.state.global_step > 0


def _live(parts: Parts, spec: RunSpec, folder: Path, *, resume: bool, argv: Sequence[str], quiet: bool) -> Record:
    wait()  # until the folder is ready
    record = _first_record(parts, spec, argv)
    tell_scored_on(spec, record.scored_on)
    recording = _Recording(record, folder)
    with _progress(spec, quiet) as progress, _recorded(recording):
        trainer = recording.trainer = make_trainer(parts, spec, folder, progress)
        described = Manifest.describe(adapters(parts.model)) if isinstance(parts.method, AdapterMethod) else ()
        result, metrics, sample = _fitted(trainer, parts, spec, resume)
        write_result(on_whole_base(result, spec), trainer.state.global_step, folder, described, sample)
        budget = _budget(spec, result, folder)
        recording.record = replace(
            _last_record(recording.record, parts, result, metrics), budget=budget, unmet=_unmet(budget, parts.method)
        )
    return recording.record


def _fitted(
    trainer: Trainer, parts: Parts, spec: RunSpec, resume: bool
) -> tuple[FitResult, dict[str, float], dict[str, torch.Tensor]]:
    """What all processes of a run do together: the result, its metrics, and a batch to compare its export on."""
    # From here on every random number follows from the seed, whatever was drawn while loading.
    set_seed(spec.training.seed)
    result = fit(
        trainer,
        parts.method,
        resume=resume,
        micro_batch=spec.training.micro_batch,
        final_micro_batch=spec.training.final_micro_batch,
        log_omegas="all",
        engine=spec.training.engine,  # type: ignore[arg-type]  # checked by the configuration
    )
    metrics = evaluate(trainer)
    answer_in_own_units(result, parts)
    return result, metrics, batch_to_compare(trainer, parts)


def _follow(spec: RunSpec, folder: Path, *, resume: bool, argv: Sequence[str]) -> Record:
    """A process beside the main one: it does its share of the training, and writes nothing."""
    parts = build(spec, begun_steps(folder / "checkpoints") if resume else None)
    record = _first_record(parts, spec, argv)
    wait()  # until the main process has the folder ready
    result, metrics, _ = _fitted(make_trainer(parts, spec, folder, []), parts, spec, resume)
    return _last_record(record, parts, result, metrics)


def refused(spec: RunSpec, error: str, metric: str = "") -> Record:
    """The record of a run that could not start."""
    return replace(_blank(spec, metric), status="failed", error=error)


def _blank(spec: RunSpec, metric: str) -> Record:
    """The record of a run that has built nothing yet."""
    return Record(
        status="running",
        method=spec.method.name,
        preset=spec.make_method().label,
        task=spec.task.name,
        model=spec.model.name,
        seed=spec.training.seed,
        k=None,
        r=None,
        n_adapters=0,
        kept=(),
        adapters=(),
        trainable_params={},
        metrics={},
        metric=metric,
        phases=(),
        seam_step=None,
        max_steps=None,
        why="",
        versions=collect_versions(),
        argv=tuple(sys.argv),
        config=spec.to_dict(),
        error=None,
        machine={**machine(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"},
    )


def _first_record(parts: Parts, spec: RunSpec, argv: Sequence[str]) -> Record:
    live = adapters(parts.model) if isinstance(parts.method, AdapterMethod) else ()
    tuned = tuned_layers(parts.model) if isinstance(parts.method, TunerMethod) else ()
    return replace(
        _blank(spec, parts.task.metric),
        preset=parts.method.label,
        r=parts.rank if live else None,
        n_adapters=len(live) + len(tuned),
        max_steps=parts.max_steps,
        scored_on=scored_on(spec, parts.task),
        argv=tuple(argv) or tuple(sys.argv),
    )


def _last_record(record: Record, parts: Parts, result: FitResult, metrics: dict[str, float]) -> Record:
    selection = result.selection
    return replace(
        record,
        status="ok",
        max_steps=result.max_steps,
        k=_fixed_k(parts, selection, record.n_adapters),
        kept=_kept(parts, selection),
        adapters=() if selection is None else _scores(selection),
        trainable_params={"warmup": result.phases[0].trainable_params, "final": result.phases[-1].trainable_params},
        metrics=metrics,
        phases=result.phases,
        seam_step=result.seam_step,
        why=selection.why if selection else _why_all(parts.method),
        placement={} if selection is None else dict(selection.placement or {}),
        predicted={phase: dict(numbers) for phase, numbers in result.predicted.items()},
        frontier=result.frontier,
    )


def _fixed_k(parts: Parts, selection: Selection | None, n: int) -> int | None:
    """How many adapters the settings say, or None where that is an outcome or there are none."""
    if parts.method.chooses_k or parts.method.needs.limit is not None:
        return None
    return (n or None) if selection is None else selection.k


def _kept(parts: Parts, selection: Selection | None) -> tuple[Kept, ...]:
    if selection is not None:
        return tuple(Kept(name=c.name, omega=c.omega, rank=c.rank) for c in selection.kept)
    if not isinstance(parts.method, TunerMethod):
        return ()
    rank = parts.method.rank(parts.rank)
    return tuple(Kept(name=name, omega=1.0, rank=rank) for name in tuned_layers(parts.model))


def _why_all(method: Method) -> str:
    if isinstance(method, PlainMethod):
        return method.trains
    return f"{method.name} sits on every target; it is no plain LoRA, so its adapter has PEFT's own format"


def _budget(spec: RunSpec, result: FitResult, folder: Path) -> dict[str, int]:
    """Adapter parameters asked for and spent; nothing for a method without adapters."""
    if not (folder / ADAPTER).is_dir():
        return {}
    files = [file for file in (folder / ADAPTER).iterdir() if file.suffix == ".safetensors"]
    asked = {} if spec.model.params is None else {"asked": parse_params(spec.model.params)}
    return {**asked, **result.adapter_params, "stored_bytes": sum(file.stat().st_size for file in files)}


def _unmet(budget: dict[str, int], method: Method) -> str:
    """Where a budget was asked for and is more than 5% off: by how much, and why."""
    asked = budget.get("asked")
    if asked is None or (budget["effective"] >= 0.95 * asked and budget["peak"] <= 1.05 * asked):
        return ""
    shares = f"{budget['effective'] / asked:.0%} of the budget at the end, {budget['peak'] / asked:.0%} at the peak"
    return f"{shares}: {method.spending}"


def _scores(selection: Selection) -> tuple[AdapterScore, ...]:
    return tuple(
        AdapterScore(
            name=c.name,
            block=block_of(c.name),
            kind=c.name.rsplit(".", 1)[-1],
            omega=c.omega,
            score=c.score,
            kept=c.kept,
        )
        for c in selection.choices
    )

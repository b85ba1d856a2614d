"""Which checkpoints of a run are whole, and how the seam's own checkpoint is made from the last one of warm-up."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zipfile
from pathlib import Path, PureWindowsPath

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import PreTrainedModel, Trainer, TrainerState

from weightlora.errors import CheckpointError
from weightlora.files import new_folder, read_object, sweep, write_text
from weightlora.graft.manifest import MANIFEST, STATE, Manifest, readable
from weightlora.training.identity import RUN, Run
from weightlora.training.inside import Inside
from weightlora.training.whole_run import InnerCallback

log = logging.getLogger("weightlora")

TRAINER_STATE = "trainer_state.json"
SEAL = "checksums.json"
# What numpy's random state in the trainer's own file needs; the trainer allows the same.
_NUMPY = re.compile(
    r"numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.ndarray|numpy\.dtype|numpy\.dtypes\.UInt32DType"
)
_NAME = re.compile(r"^(checkpoint|seam)-(\d+)$")
_BEST = re.compile(r"checkpoint-\d+")  # as the trainer names its own
_SHARD = re.compile(r"\w[\w.-]*")


def whole(folder: Path, *, manifest: bool = True) -> int | None:
    """The step of a checkpoint that can be resumed from, or None.

    The trainer writes its state file after everything else of a checkpoint, so a checkpoint that says whose it is and
    has a readable state file and a manifest has all its files. ``manifest=False``: a method without adapters writes
    none.
    """
    found = _NAME.match(folder.name)
    if not found or not (folder / RUN).is_file() or (manifest and not (folder / MANIFEST).is_file()):
        return None
    step = int(found.group(2))
    return step if (read_object(folder / TRAINER_STATE) or {}).get("global_step") == step else None


def latest(output_dir: Path, *, manifest: bool = True) -> Path | None:
    """The furthest whole checkpoint; at equal step the one after the seam."""
    ranked = _ranked(output_dir, manifest)
    return ranked[-1] if ranked else None


def begun_steps(output_dir: Path) -> int | None:
    """Optimizer steps, from first to last, of the run whose checkpoints these are; None where none is whole.

    Counted when it began: another number of processes would count the steps of an epoch otherwise.
    """
    folder = latest(output_dir, manifest=False)
    steps = None if folder is None else (read_object(folder / TRAINER_STATE) or {}).get("max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def folders(output_dir: Path) -> list[Path]:
    """All checkpoints in a folder that hold something, whole or not."""
    found = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    return [folder for folder in found if _NAME.match(folder.name) and folder.is_dir() and any(folder.iterdir())]


def check_length(start: Path, steps: int) -> None:
    """Raise CheckpointError unless the run of a checkpoint has as many optimizer steps, first to last."""
    begun = (read_object(start / TRAINER_STATE) or {}).get("max_steps")
    if begun != steps:
        raise CheckpointError(
            f"{start} is of a run of {begun} steps, this one has {steps}; resume with max_steps={begun}, or begin a run"
            " in another output_dir"
        )


def _ranked(output_dir: Path, manifest: bool) -> list[Path]:
    """Whole checkpoints, the furthest last."""
    found = [
        (step, folder.name.startswith("seam"), folder)
        for folder in folders(output_dir)
        if (step := whole(folder, manifest=manifest)) is not None
    ]
    return [folder for _, _, folder in sorted(found)]


def seal(folder: Path) -> None:
    """Write the hash of every file of a finished checkpoint, so that damage and swapped files are seen later.

    PEFT keeps an adapter that is not called "default" in a folder of its own there.

    Random states of other processes are left out: those may still be writing them.
    """
    if folder.is_dir():
        write_text(folder / SEAL, json.dumps(_hashes(folder), indent=1) + "\n")


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / SEAL and not re.match(r"rng_state_\d+\.pth$|\.", file.name):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            found[file.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that looks whole, in a few words; None if nothing is.

    Files are compared with the checkpoint's own hashes. One without (its process died in the last moment) is looked at
    file by file. No file with code in it is ever loaded.
    """
    changed = _changed(folder) or _absent(folder) or _elsewhere(folder)
    if changed is not None:
        return changed
    broken = [file for file in sorted(folder.rglob("*.safetensors")) if not readable(file)]
    broken += [file for file in sorted(folder.rglob("*.json")) if not _is_json(file)]
    if broken:
        return f"{broken[0].relative_to(folder).as_posix()} is damaged"
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        try:
            with zipfile.ZipFile(file) as archive:
                bad = None if (folder / SEAL).exists() else archive.testzip()
            code = [name for name in get_unsafe_globals_in_checkpoint(file) if not _NUMPY.fullmatch(name)]
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, KeyError, EOFError, IndexError):
            return f"{file.name} is damaged"
        if bad is not None:
            return f"{file.name} is damaged"
        if code:
            return f"{file.name} holds code ({code[0]}) and is not loaded"
    return None


def _absent(folder: Path) -> str | None:
    """The first random state that is not there, of the processes that made the checkpoint: theirs are written apart.

    Without one the trainer would go on with other random numbers, and say so to nobody.
    """
    try:
        together = (read_object(folder / MANIFEST) or {})["data"]["batch"]["processes"]
    except (KeyError, TypeError):
        return None  # a method without adapters, or damage that is told elsewhere
    if not isinstance(together, int) or not 1 < together < 2**16:
        return None
    names = [f"rng_state_{rank}.pth" for rank in range(together)]
    return next((f"{name} is missing" for name in names if not (folder / name).is_file()), None)


def _elsewhere(folder: Path) -> str | None:
    """The first file that names another one, for the trainer to read, and may so lead out of the run's folder."""
    state = read_object(folder / TRAINER_STATE)
    if state is None:
        return f"{TRAINER_STATE} is damaged"
    best, step = state.get("best_model_checkpoint"), state.get("best_global_step")
    if best is not None and not (isinstance(best, str) and _BEST.fullmatch(PureWindowsPath(best).name)):
        return f"{TRAINER_STATE} is damaged: best_model_checkpoint {best!r} is no checkpoint"
    if step is not None and not isinstance(step, int):
        return f"{TRAINER_STATE} is damaged: best_global_step {step!r} is no number of steps"
    for file in sorted(folder.glob("*.index.json")):
        shards = (read_object(file) or {}).get("weight_map")
        if not isinstance(shards, dict):
            return f"{file.name} is damaged"
        for shard in shards.values():
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                return f"{file.name} is damaged: it names {shard!r}, which is no file beside it"
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _changed(folder: Path) -> str | None:
    """The first file that is not as it was written."""
    if not (folder / SEAL).exists():
        return None
    sealed = read_object(folder / SEAL)
    if sealed is None:
        return f"{SEAL} is damaged"
    now = _hashes(folder)
    for name in sorted({*sealed, *now}):
        if sealed.get(name) != now.get(name):
            return f"{name} is missing" if name not in now else f"{name} is damaged: it is not the file that was saved"
    return None


def resolve(resume: bool | str | Path, output_dir: Path, *, manifest: bool = True) -> Path | None:
    """The checkpoint that ``fit(resume=...)`` means: a folder, the latest whole one (True; None if there is none), or
    nothing.

    Raises:
        CheckpointError: the named folder is not a whole checkpoint; the message names one that is.
    """
    if resume is False:
        return None
    best, broken = _best(output_dir, manifest)
    if resume is True:
        for folder, what in broken.items():
            log.warning("%s: %s; it is not used", folder, what)
        if best is None and broken:
            folder, what = next(iter(broken.items()))
            raise CheckpointError(
                f"no checkpoint in {output_dir} can be used: {folder.name}: {what}; restore it, or remove the"
                " checkpoints to train from the start"
            )
        return best
    folder = Path(resume)
    instead = f"; {best} is whole" if best else ""
    if whole(folder, manifest=manifest) is None:
        raise CheckpointError(f"{folder} is not a whole checkpoint of a WeightLoRA run{instead}")
    wrong = damage(folder)
    if wrong is not None:
        raise CheckpointError(f"{folder / wrong.split(' ', 1)[0]} {wrong.split(' ', 1)[1]}{instead}")
    return folder


def _best(output_dir: Path, manifest: bool) -> tuple[Path | None, dict[Path, str]]:
    """The furthest checkpoint without damage, and what is wrong with the others beyond it.

    One that is not whole but sealed was whole once: it is damaged, not a save that a dead process left unfinished.
    """
    ranked = _ranked(output_dir, manifest)
    sealed = [path.parent for path in sorted(output_dir.glob(f"*-*/{SEAL}")) if _NAME.match(path.parent.name)]
    broken = {folder: damage(folder) or "is damaged" for folder in sealed if folder not in ranked}
    for folder in reversed(ranked):
        what = damage(folder)
        if what is None:
            return folder, broken
        broken[folder] = what
    return None, broken


def train_on(trainer: Trainer, start: Path | None, until: int) -> dict[str, float]:
    """``trainer.train`` from `start`; if that is at step `until` already, only load: the trainer would do a step too
    many."""
    if start is None:
        return dict(trainer.train().metrics)
    best = best_so_far(start, needed=trainer.args.load_best_model_at_end)
    if (whole(start, manifest=False) or 0) < until:
        callback = _BestSoFar(best)
        trainer.add_callback(callback)
        try:
            return dict(trainer.train(resume_from_checkpoint=str(start)).metrics)
        finally:
            trainer.remove_callback(callback)
    inside = Inside(trainer)
    inside.load_checkpoint(start)
    trainer.state = TrainerState.load_from_json(str(start / TRAINER_STATE))
    trainer.state.best_model_checkpoint = None if best is None else str(best)
    if trainer.args.load_best_model_at_end and best is not None:
        inside.load_best()
    return {}


def best_so_far(start: Path, *, needed: bool) -> Path | None:
    """The best checkpoint that `start` knows of, looked for beside it by name: a run may have been moved, and what a
    file says must not lead elsewhere. None where there was none yet, or where it is gone and nobody needs it.

    Raises:
        CheckpointError: it is needed, to be loaded at the end, and gone or damaged.
    """
    named = (read_object(start / TRAINER_STATE) or {}).get("best_model_checkpoint")
    if named is None:
        return None
    best = start.parent / PureWindowsPath(named).name
    wrong = damage(best) if best.is_dir() else "it is missing"
    if wrong is None:
        return best
    if needed:
        raise CheckpointError(
            f"{best} is the best checkpoint that {start} knows of, to be loaded at the end, and cannot be: {wrong};"
            " restore it, or resume with load_best_model_at_end=False"
        )
    return None


class _BestSoFar(InnerCallback):
    """Puts the best checkpoint in the place of the one that the trainer read from its state file."""

    def __init__(self, best: Path | None) -> None:
        self.best = None if best is None else str(best)

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        state.best_model_checkpoint = self.best


def discard_after(output_dir: Path, step: int) -> None:
    """Remove half-written and damaged checkpoints beyond `step`: a resumed run writes them again and must not mix old
    files with new.

    Raises:
        CheckpointError: one is whole and of a plain trainer; it is not ours to remove.
    """
    broken = []
    for folder in folders(output_dir):
        found = _NAME.match(folder.name)
        if found and int(found.group(2)) >= step and (whole(folder) is None or damage(folder) is not None):
            # Ours are written before the trainer's own last file, its state.
            if read_object(folder / TRAINER_STATE) and not any(
                (folder / name).exists() for name in (MANIFEST, SEAL, RUN)
            ):
                raise CheckpointError(
                    f"{folder} is the checkpoint of a trainer without a method, and this run would write over it;"
                    " move it, or give another output_dir"
                )
            broken.append(folder)
    for folder in broken:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_all(output_dir: Path) -> None:
    """Remove the temporary files that a process left in checkpoints when it died while it sealed them."""
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if _NAME.match(folder.name):
            sweep(folder, SEAL, MANIFEST, STATE)


def write_seam(
    source: Path,
    target: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
    run: Run,
    train_batch_size: int,
) -> Path:
    """Turn the last checkpoint of warm-up into the first one after it; it appears at `target` only when whole.

    Scheduler, scaler and random state are the trainer's own files, copied; model and optimizer are written anew, after
    surgery. "Best model so far" starts again: a warm-up model has another structure and cannot be loaded back later.
    """
    state: dict[str, object] = json.loads((source / TRAINER_STATE).read_text(encoding="utf-8"))
    state |= {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None}
    state["train_batch_size"] = train_batch_size
    with new_folder(target) as folder:
        for file in source.iterdir():
            if file.is_file() and (file.suffix in (".pth", ".pt") or file.name == "training_args.bin"):
                shutil.copy2(file, folder / file.name)
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        manifest.write(folder, {})
        run.write(folder / RUN)
        write_text(folder / TRAINER_STATE, json.dumps(state, indent=2, sort_keys=True) + "\n")
        seal(folder)
    return target

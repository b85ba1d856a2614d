"""Which checkpoints of a run are whole, and how the seam's own checkpoint is made from the last one of warm-up."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState

from weightlora.errors import CheckpointError
from weightlora.files import new_folder, write_text
from weightlora.graft import MANIFEST, Manifest

TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"^(checkpoint|seam)-(\d+)$")


def whole(folder: Path, *, manifest: bool = True) -> int | None:
    """The step of a checkpoint that can be resumed from, or None.

    The trainer writes its state file after everything else of a checkpoint, so a checkpoint with a readable state file
    and a readable manifest has all its files. ``manifest=False``: a method without adapters writes none.
    """
    found = _NAME.match(folder.name)
    if not found or (manifest and not (folder / MANIFEST).is_file()):
        return None
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step = int(found.group(2))
    return step if isinstance(state, dict) and state.get("global_step") == step else None


def latest(output_dir: Path, *, manifest: bool = True) -> Path | None:
    """The furthest whole checkpoint; at equal step the one after the seam."""
    ranked = [
        (step, folder.name.startswith("seam"), folder)
        for folder in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (step := whole(folder, manifest=manifest)) is not None
    ]
    return max(ranked)[2] if ranked else None


def resolve(resume: bool | str | Path, output_dir: Path, *, manifest: bool = True) -> Path | None:
    """The checkpoint that ``fit(resume=...)`` means: a folder, the latest whole one (True; None if there is none), or
    nothing.

    Raises:
        CheckpointError: the named folder is not a whole checkpoint; the message names one that is.
    """
    if resume is False:
        return None
    best = latest(output_dir, manifest=manifest)
    if resume is True:
        return best
    folder = Path(resume)
    if whole(folder, manifest=manifest) is None:
        instead = f"; {best} is whole" if best else ""
        raise CheckpointError(f"{folder} is not a whole checkpoint of a WeightLoRA run{instead}")
    return folder


def train_on(trainer: Trainer, start: Path | None, until: int) -> dict[str, float]:
    """``trainer.train`` from `start`; if that is at step `until` already, only load: the trainer would do a step too
    many."""
    if start is None or (whole(start, manifest=False) or 0) < until:
        return dict(trainer.train(resume_from_checkpoint=None if start is None else str(start)).metrics)
    trainer._load_from_checkpoint(str(start))
    trainer.state = TrainerState.load_from_json(str(start / TRAINER_STATE))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return {}


def discard_after(output_dir: Path, step: int) -> None:
    """Remove half-written checkpoints beyond `step`: a resumed run writes them again and must not mix old files with
    new."""
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        found = _NAME.match(folder.name)
        if found and int(found.group(2)) >= step and whole(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def write_seam(
    source: Path,
    target: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
    train_batch_size: int,
) -> Path:
    """Turn the last checkpoint of warm-up into the first one after it; it appears at `target` only when whole.

    Scheduler, scaler and random state are the trainer's own files, copied; model and optimizer are written anew, after
    surgery. "Best model so far" starts again: a warm-up model has another structure and cannot be loaded back later.
    """
    state: dict[str, Any] = json.loads((source / TRAINER_STATE).read_text(encoding="utf-8"))
    state |= {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None}
    state["train_batch_size"] = train_batch_size
    with new_folder(target) as folder:
        for file in source.iterdir():
            if file.is_file() and (file.suffix in (".pth", ".pt") or file.name == "training_args.bin"):
                shutil.copy2(file, folder / file.name)
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        manifest.write(folder, {})
        write_text(folder / TRAINER_STATE, json.dumps(state, indent=2, sort_keys=True) + "\n")
    return target

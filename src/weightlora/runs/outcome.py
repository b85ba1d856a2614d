"""What a run comes to: its metrics, and the adapter, selection and manifest in its directory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import Trainer

from weightlora.files import new_folder, write_text
from weightlora.graft.adapters import base_of, is_sharded, trained_module
from weightlora.graft.export import export
from weightlora.graft.manifest import MANIFEST, Manifest, fingerprint
from weightlora.graft.rebuild import take_over
from weightlora.graft.tuners import save_own_format
from weightlora.methods import TunerMethod
from weightlora.runs.build import Parts, build
from weightlora.runs.record import EVAL_LOSS
from weightlora.runs.spec import RunSpec
from weightlora.training import FitResult
from weightlora.training.inside import Inside

ADAPTER = "adapter"
MODEL = "model"
SELECTION = "selection.json"
SAMPLE_ROWS = 2


def evaluate(trainer: Trainer) -> dict[str, float]:
    """The task's metrics on its validation rows, without what they cost."""
    metrics = trainer.evaluate()
    plain = {
        key.removeprefix("eval_"): float(value) for key, value in metrics.items() if isinstance(value, int | float)
    }
    speed = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
    names = {"loss": EVAL_LOSS}
    return {names.get(key, key): value for key, value in plain.items() if key not in speed}


def write_result(
    result: FitResult,
    step: int,
    folder: Path,
    described: tuple[tuple[str, int, int, int], ...],
    sample: dict[str, Tensor],
) -> None:
    """Write the result, reloaded and compared, beside its selection and manifest."""
    if isinstance(result.method, TunerMethod):
        save_own_format(result.model, folder / ADAPTER, sample)
        return
    if not result.method.learns:
        return  # the model is what it was
    if result.selection is None:
        with new_folder(folder / MODEL) as temporary:
            result.model.save_pretrained(temporary)  # type: ignore[operator]
        return
    export(result, folder / ADAPTER, "native", sample=sample, overwrite=True)
    result.selection.save(folder / SELECTION)
    manifest = Manifest(
        stage="final",
        step=step,
        adapter="default",
        adapters=described,
        method=result.method.to_dict(),
        base=fingerprint(result.model),
        selection=result.selection,
        data={"phases": [vars(phase) for phase in result.phases], "log": _omega_log(result)},
    )
    write_text(folder / MANIFEST, manifest.to_json())


def answer_in_own_units(result: FitResult, parts: Parts) -> None:
    """Let the judged model of a regression answer in the units of the user's targets, before it is written."""
    targets = parts.prepared.targets
    if targets is not None:
        head = cast(nn.Linear, trained_module(result.model, targets.head))
        targets.fold(head, base_of(result.model).config)


def batch_to_compare(trainer: Trainer, parts: Parts) -> dict[str, Tensor]:
    """A batch to compare logits on; its first rows only where each token has a logit per word of the vocabulary."""
    rows = SAMPLE_ROWS if parts.task.head in ("seq2seq-lm", "causal-lm") else None
    batch = Inside(trainer).prepared(next(iter(trainer.get_eval_dataloader())))
    return {key: value[:rows] for key, value in batch.items() if key not in trainer.label_names}


def _omega_log(result: FitResult) -> list[dict[str, object]]:
    """The loss and omega entries of the trainer's log, for whoever draws them later."""
    return [
        {key: value for key, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}
        for entry in result.log_history
    ]


def on_whole_base(result: FitResult, spec: RunSpec) -> FitResult:
    """The result on a base that is not sharded: built anew, because the base never changed."""
    if not is_sharded(result.model) or result.selection is None:
        return result
    model = build(spec).model
    take_over(model, result.model, result.selection)
    return replace(result, model=model)

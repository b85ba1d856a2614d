"""``fit`` for methods that decide nothing: full fine-tuning, PEFT's own tuners."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn
from transformers import Trainer

from weightlora.cost.measure import PeakMemory
from weightlora.errors import AdapterError, CheckpointError
from weightlora.graft.adapters import has_adapters
from weightlora.graft.quantised import keep_unpacked
from weightlora.graft.tuners import check_tuner, tuner_params
from weightlora.methods import PlainMethod, TunerMethod
from weightlora.training import checkpoint
from weightlora.training.finite import FiniteCallback, naming_the_last_good
from weightlora.training.identity import RUN, Run, check_folder, enter_folder
from weightlora.training.inside import model_of
from weightlora.training.order import DataOrder
from weightlora.training.processes import main_alone, processes
from weightlora.training.results import FitResult, phase_result
from weightlora.training.resuming import set_rates
from weightlora.training.trainer import (
    average_micro_batches,
    checkpoint_as_in_training,
    planned_steps,
    step_counted,
)


def train_plain(
    trainer: Trainer, method: PlainMethod | TunerMethod, resume: bool | str | Path, overwrite: bool, measure: bool
) -> FitResult:
    """A method that decides nothing (full fine-tuning, PEFT's own tuners): the trainer as it is, measured."""
    if not method.learns:
        return _untrained(trainer, method)
    model = model_of(trainer)
    _arrange(trainer, model, method)
    keep_unpacked(model)
    output_dir = Path(str(trainer.args.output_dir))
    start = checkpoint.resolve(resume, output_dir, manifest=False)
    others = check_folder(output_dir, checkpoint.folders(output_dir), start, resume=resume, overwrite=overwrite)
    new = Run.new(method, model)
    if start is not None:
        _check_same_run(start, method, model)
    steps = planned_steps(trainer)
    if start is not None:
        checkpoint.check_length(start, steps)
    if resume is not False:
        with main_alone() as mine:
            if mine:
                checkpoint.sweep_all(output_dir)
    run = enter_folder(output_dir, start, others, new, trainer.args.device)
    if processes() > 1:
        average_micro_batches(trainer)  # so that two processes have the gradient of one with the whole batch
    if measure:
        checkpoint_as_in_training(trainer)
    finite = FiniteCallback(trainer, run)
    trainer.add_callback(finite)
    order, begun = DataOrder(trainer), 0 if start is None else checkpoint.whole(start, manifest=False) or 0
    try:
        with (
            naming_the_last_good(output_dir, manifest=False),
            step_counted(trainer, measure) as seen,
            order.over(start, begun),
        ):
            peak, since = PeakMemory(), time.perf_counter()
            metrics = checkpoint.train_on(trainer, start, steps)
            finite.watch.check()
    finally:
        trainer.remove_callback(finite)
    seconds = round(time.perf_counter() - since, 3)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    phase = phase_result(trainer, "final", trainer.state.global_step, seconds, trainable, seen.cost, peak)
    return FitResult(
        model=model,
        method=method,
        selection=None,
        phases=(phase,),
        metrics=metrics,
        max_steps=steps,
        seam_step=None,
        adapter_params=tuner_params(model) if isinstance(method, TunerMethod) else {},
        log_history=tuple(trainer.state.log_history),
    )


def _arrange(trainer: Trainer, model: nn.Module, method: PlainMethod | TunerMethod) -> None:
    """Refuse a model that was not built for the method; let what it trains train, at its rates."""
    if isinstance(method, TunerMethod):
        check_tuner(model, method.kind)
        set_rates(trainer, method)
        return
    if has_adapters(model):
        raise AdapterError(f"method {method.name!r} trains the plain model; give the trainer a model without adapters")
    if all(p.requires_grad for p in model.parameters()):
        method.freeze(model)


def _untrained(trainer: Trainer, method: PlainMethod | TunerMethod) -> FitResult:
    """A method that trains nothing: the model as it is, with a phase without steps."""
    model = model_of(trainer)
    if has_adapters(model):
        raise AdapterError(
            f"method {method.name!r} evaluates the plain model; give the trainer a model without adapters"
        )
    phase = phase_result(trainer, "final", 0, 0.0, 0, None, PeakMemory())
    return FitResult(
        model=model, method=method, selection=None, phases=(phase,), metrics={}, max_steps=0, seam_step=None
    )


def _check_same_run(start: Path, method: PlainMethod | TunerMethod, model: nn.Module) -> None:
    """The checkpoint must belong to this method and model, and to as many processes."""
    run = Run.read(start / RUN)
    assert run is not None  # it is whole
    run.check_same(method, model, start)
    made_by = max(1, len(list(start.glob("rng_state_*.pth"))))
    if made_by != processes():
        raise CheckpointError(
            f"{start} was made by {made_by} processes, and this run has {processes()}; {method.name} can only be"
            f" resumed by as many: resume on {made_by}"
        )

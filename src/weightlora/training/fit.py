"""``fit(trainer, method)``: two calls of the trainer's own ``train``, with surgery between them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import Trainer

from weightlora.errors import ConfigError
from weightlora.graft.fast import PathName
from weightlora.methods import AdapterMethod, Method, PlainMethod, TunerMethod
from weightlora.training.borrowed import borrowed
from weightlora.training.finite import naming_the_last_good
from weightlora.training.phases import Running
from weightlora.training.plain import train_plain
from weightlora.training.preflight import check_best, check_fit, check_trainers_model
from weightlora.training.prepare import prepare
from weightlora.training.results import FitResult, PhaseResult
from weightlora.training.sharding import as_data_parallel, asked_for, check_sharding
from weightlora.training.told import beside_the_losses, tell_slow_bfloat16
from weightlora.training.trainer import check_trainer


def fit(  # noqa: PLR0913 - one argument per user setting
    trainer: Trainer,
    method: Method,
    *,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    micro_batch: int | None = None,
    final_micro_batch: int | None = None,
    measure: bool = True,
    log_omegas: Literal["summary", "all"] = "summary",
    select_only: bool = False,
    engine: PathName = "auto",
) -> FitResult:
    """Train with a method, instead of ``trainer.train()``.

    Runs the trainer to step T. There, at the seam, the method chooses the adapters to keep (the survivors), the others
    are removed, survivors may grow, and a checkpoint is written. The trainer resumes from it: schedule, rows, random
    numbers and logging go on. What it decides it says where the trainer prints its losses, or to the logger
    ``weightlora`` where your program shows that one's lines of level INFO.

    Args:
        trainer: any ``transformers.Trainer`` (TRL's too) around a model with LoRA adapters.
        method: for example ``WeightLoRA(k=10, select_after=100)``.
        resume: True goes on from the latest whole checkpoint in ``output_dir``, or begins if there is none; a path
            goes on from that checkpoint. Method, base and number of steps must be those of the run.
        overwrite: remove the checkpoints of other runs from ``output_dir``. Without it such a folder is refused.
        micro_batch, final_micro_batch: examples per device and forward pass, before and after the seam. Accumulation
            is adapted, so that the effective batch and the number of steps stay those of the trainer's arguments; the
            gradient is the mean over that batch. None: the trainer's batch size.
        measure: count kept activation bytes and FLOPs of one micro-batch per phase, by an extra forward and backward
            pass, or, if the loss function is your own, in the first step that runs. Training is not changed by it.
        log_omegas: which gates go to the trainer's log: "summary" (how many are on, largest, smallest) or "all".
        select_only: stop at the seam: adapters are chosen, and nothing is trained after that.
        engine: the code that computes the adapters. "autograd": keeps only x, shared by q, k and v, and the
            rank-r product. "triton": the same with CUDA kernels. "auto": triton if it can run, else autograd.
            "reference": PEFT's formula, readable. "stock": PEFT's own forward, for comparison. The result is a stock
            PEFT model in every case.

    Returns:
        A :class:`FitResult`; ``trainer.model`` is a plain PEFT model with the survivors only. The trainer's arguments
        and rows, the model's mode, gradient checkpointing and input hooks are given back as they were, after an error
        as well; ``trainer.state``, optimizer and scheduler are the run's, as after ``trainer.train()``.

    Raises:
        AdapterError, ScheduleError, CheckpointError, ConfigError: before the first step; nothing was changed or
            written.
        AdapterError: at the first step after the seam, where a survivor gets no gradient.
        DivergedError: a loss, gradient, gate or score became NaN or infinite; nothing was saved or selected after
            that. Every step checks on the device; the result is read at steps that log, save or evaluate, and before
            a selection.

    Source: paper, section 3.3 (T steps, then disconnect; "the batch size can be increased"). Departs from it in
    resuming through a checkpoint, which is what makes a killed run continue to the same adapter.
    """
    micro_batches = check_fit(trainer, method, resume, micro_batch, final_micro_batch, log_omegas)
    check_trainer(trainer)
    check_sharding(trainer)
    check_best(trainer)
    tell_slow_bfloat16(trainer)
    if isinstance(method, PlainMethod | TunerMethod):
        if asked_for(trainer) is not None:
            raise ConfigError(
                f"FSDP shards the frozen base under adapters; {method.name} runs on one process, or by torchrun (DDP)"
            )
        with beside_the_losses(trainer), borrowed(trainer):
            return train_plain(trainer, method, resume, overwrite, measure)
    assert isinstance(method, AdapterMethod)  # there are three kinds
    check_trainers_model(trainer)
    with beside_the_losses(trainer), borrowed(trainer):
        prepared = prepare(trainer, method, micro_batches, resume=resume, overwrite=overwrite, engine=engine)
        running = Running(prepared, measure=measure, log_omegas=log_omegas)
        running.enter(resumed=resume is not False)
        with naming_the_last_good(prepared.output_dir), as_data_parallel(trainer, sharded=prepared.sharded):
            try:
                return running.train(select_only=select_only)
            finally:
                prepared.driver.let_go()


__all__ = ["FitResult", "PhaseResult", "fit"]

"""``fit(trainer, method)``: two calls of the trainer's own ``train``, with surgery between them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import Trainer

from weightlora.errors import ConfigError
from weightlora.graft import PathName
from weightlora.methods import AdapterMethod, Method, PlainMethod, TunerMethod
from weightlora.training.borrowed import borrowed
from weightlora.training.finite import naming_the_last_good
from weightlora.training.phases import Running
from weightlora.training.plain import train_plain
from weightlora.training.preflight import check_best, check_fit, check_trainers_model
from weightlora.training.prepare import prepare
from weightlora.training.results import FitResult, PhaseResult
from weightlora.training.sharding import as_data_parallel, asked_for, check_sharding
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

    Runs the trainer to step T. There, at the seam, the method decides, other adapters are removed, survivors may grow,
    and a checkpoint is written. The trainer resumes from it: schedule, rows, random numbers and logging go on.

    Args:
        trainer: any ``transformers.Trainer`` (TRL's too) around a model with LoRA adapters.
        method: for example ``WeightLoRA(k=10, select_after=100)``.
        resume: True goes on from the latest whole checkpoint in ``output_dir`` (from the start if there is none); a
            path from that one. Method, base and number of steps must be the run's.
        overwrite: remove the checkpoints of other runs from ``output_dir``, which is refused otherwise.
        micro_batch, final_micro_batch: examples per device and forward pass, before and after the seam. Accumulation
            changes with them so that the effective batch, and with it the number of steps, stays what the trainer's
            arguments say; the gradient is then the mean over that batch. None: leave it.
        measure: count kept activation bytes and FLOPs of one micro-batch per phase, without a trace: by an extra
            forward and backward, or, where the loss is the user's own, in the first step that runs.
        log_omegas: how much of omega goes to the trainer's log during warm-up.
        select_only: stop at the seam, with the survivors chosen and nothing trained further.
        engine: how adapters compute while they train. "autograd": keeps only x, shared by q, k and v, and the
            rank-r product. "triton": the same with CUDA kernels. "auto": triton where it can run, else autograd.
            "reference": PEFT's formula, readable. "stock": PEFT's own forward, for comparison. The result is stock
            PEFT in every case.

    Returns:
        A :class:`FitResult`; ``trainer.model`` is a plain PEFT model with the survivors only. The trainer's arguments
        and rows, the model's mode, gradient checkpointing and input hooks are given back as they were, after an error
        as well; ``trainer.state``, optimizer and scheduler are the run's, as after ``trainer.train()``.

    Raises:
        AdapterError, ScheduleError, CheckpointError, ConfigError: before the first step; nothing was changed or
            written.
        AdapterError: at the first step after the seam, where a survivor gets no gradient.
        DivergedError: a loss, gradient, gate or score became NaN or infinite; nothing was saved or selected since.
            Every step is watched on the device, and read at steps that log, save or evaluate, and before a selection.

    Source: paper, section 3.3 (T steps, then disconnect; "the batch size can be increased"). Departs from it in
    resuming through a checkpoint, which is what makes a killed run continue to the same adapter.
    """
    micro_batches = check_fit(trainer, method, resume, micro_batch, final_micro_batch, log_omegas)
    check_trainer(trainer)
    check_sharding(trainer)
    check_best(trainer)
    if isinstance(method, PlainMethod | TunerMethod):
        if asked_for(trainer) is not None:
            raise ConfigError(
                f"FSDP shards the frozen base under adapters; {method.name} runs on one process, or by torchrun (DDP)"
            )
        with borrowed(trainer):
            return train_plain(trainer, method, resume, overwrite, measure)
    assert isinstance(method, AdapterMethod)  # there are three kinds
    check_trainers_model(trainer)
    with borrowed(trainer):
        prepared = prepare(trainer, method, micro_batches, resume=resume, overwrite=overwrite, engine=engine)
        running = Running(prepared, measure=measure, log_omegas=log_omegas)
        running.enter(resumed=resume is not False)
        with naming_the_last_good(prepared.output_dir), as_data_parallel(trainer, sharded=prepared.sharded):
            try:
                return running.train(select_only=select_only)
            finally:
                prepared.driver.let_go()


__all__ = ["FitResult", "PhaseResult", "fit"]

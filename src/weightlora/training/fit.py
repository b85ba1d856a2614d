"""``fit(trainer, method)``: two calls of the trainer's own ``train``, with surgery between them."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer

from weightlora.errors import AdapterError, CheckpointError, ConfigError, ScheduleError
from weightlora.graft import Manifest, Selection, end_backward_at_lowest, has_adapters, reshape
from weightlora.methods import Method
from weightlora.training import checkpoint
from weightlora.training.callback import SeamCallback
from weightlora.training.driver import Driver
from weightlora.training.measure import StepCost, isolated_rng, step_cost

log = logging.getLogger("weightlora")


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """One phase as it ran. ``seconds`` counts this process only, so a resumed phase is shorter than the whole."""

    name: Literal["warmup", "final"]
    steps: int
    seconds: float
    micro_batch: int
    accumulation: int
    trainable_params: int
    kept_activation_bytes: int | None
    flops_per_step: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What :func:`fit` hands back: a plain PEFT model, what was kept and why, and what each phase cost."""

    model: nn.Module
    method: Method
    selection: Selection | None
    phases: tuple[PhaseResult, ...]
    metrics: Mapping[str, float]
    max_steps: int
    seam_step: int | None
    log_history: tuple[dict[str, Any], ...] = field(default=(), repr=False)


def fit(
    trainer: Trainer,
    method: Method,
    *,
    resume: bool | str | Path = False,
    micro_batch: tuple[int | None, int | None] = (None, None),
    measure: bool = True,
    log_omegas: Literal["summary", "all"] = "summary",
    select_only: bool = False,
) -> FitResult:
    """Train with a method, instead of ``trainer.train()``.

    Runs the trainer to step T, lets the method decide, disconnects (and grows), and runs the trainer on from a checkpoint of
    its own kind, so that schedule, data order, random numbers, distributed wrapping and logging go on as if nothing had been.

    Args:
        trainer: any ``transformers.Trainer`` (TRL's too) around a model with LoRA adapters.
        method: for example ``WeightLoRA(k=10, warmup_steps=100)``.
        resume: True goes on from the latest whole checkpoint in ``output_dir`` (from the start if there is none); a path from
            that one.
        micro_batch: examples per device and forward pass (before, after the seam). Accumulation changes with it so that the
            effective batch, and with it the number of steps, stays what the trainer's arguments say. None: leave it.
        measure: count kept activation bytes and FLOPs of one micro-batch per phase (one extra forward and backward each).
        log_omegas: how much of omega goes to the trainer's log during warm-up.
        select_only: stop at the seam, with the survivors chosen and nothing trained further.

    Returns:
        A :class:`FitResult`; ``trainer.model`` is a plain PEFT model with the survivors only.

    Raises:
        AdapterError, ScheduleError, CheckpointError, ConfigError: before the first step; nothing was changed or written.

    Source: paper, section 3.3 (T steps, then disconnect; "the batch size can be increased"). Departs from it in resuming
    through a checkpoint, which is what makes a killed run continue to the same adapter.
    """
    _check_trainer(trainer)
    if not method.uses_adapters:
        return _train_plain(trainer, method, resume, measure)
    return _Fit(trainer, method, resume, micro_batch, measure, log_omegas).run(select_only)


class _Fit:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        trainer: Trainer,
        method: Method,
        resume: bool | str | Path,
        micro_batch: tuple[int | None, int | None],
        measure: bool,
        log_omegas: Literal["summary", "all"],
    ) -> None:
        self.trainer, self.method, self.measure, self.log_omegas = trainer, method, measure, log_omegas
        self.output_dir = Path(trainer.args.output_dir)
        self.batches = [_split_batch(trainer, size) for size in micro_batch]
        self.max_steps = planned_steps(trainer)
        self.driver = Driver(trainer.model, method, self.max_steps)
        self.own_optimizer = trainer.optimizer is None
        self.phases: list[PhaseResult] = []
        self.start = checkpoint.resolve(resume, self.output_dir)
        self.manifest: Manifest | None = None
        self.restored: tuple[dict[str, torch.Tensor], int] | None = None
        if self.start is not None:
            self.manifest, tensors = Manifest.read(self.start)
            self.manifest.check_same_model(self.driver.adapters)
            if self.manifest.method != method.to_dict():
                raise CheckpointError(
                    f"{self.start} was made with {self.manifest.method}, not {method.to_dict()}; resume with the same method"
                )
            if self.manifest.stage == "warmup":
                self.restored = tensors, self.manifest.step
            checkpoint.discard_after(self.output_dir, self.manifest.step)

    def run(self, select_only: bool) -> FitResult:
        resumed_final = self.manifest is not None and self.manifest.stage == "final"
        if resumed_final:
            self._rebuild()
        else:
            self.driver.start(fresh=self.manifest is None)
            if self.driver.seam == 0:
                self.driver.operate(self._torch_optimizer())
        with self._callback() as callback:
            if not resumed_final and self.driver.seam:
                if self.restored is not None and self.restored[1] == self.driver.seam:
                    self._load_end_of_warmup()
                else:
                    self._set_batch(0)
                    self._train("warmup", callback)
                self._set_batch(1)
                self.start = self._seam(callback)
            self._set_batch(1 if self.driver.seam is not None else 0)
            output = {} if select_only and self.driver.selection else self._train("final", callback)
        if self.driver.selection is None:
            self.driver.operate(self._torch_optimizer())
        return FitResult(
            model=self.trainer.model,
            method=self.method,
            selection=self.driver.selection,
            phases=tuple(self.phases),
            metrics=dict(output),
            max_steps=self.max_steps,
            seam_step=self.driver.seam,
            log_history=tuple(self.trainer.state.log_history),
        )

    def _rebuild(self) -> None:
        """Give the model the structure of the checkpoint before the trainer loads it."""
        assert self.manifest is not None and self.manifest.selection is not None
        driver, selection = self.driver, self.manifest.selection
        reshape(
            driver.model,
            {c.name: c.rank for c in selection.kept},
            {c.name: c.scale for c in selection.kept},
            driver.name,
        )
        if selection.k < selection.n:
            end_backward_at_lowest(driver.model)
        driver.selection, driver.step = selection, self.manifest.step
        self.phases = [PhaseResult(**phase) for phase in self.manifest.data.get("phases", [])]

    @contextlib.contextmanager
    def _callback(self) -> Iterator[SeamCallback]:
        callback = SeamCallback(
            self.trainer,
            self.driver,
            restored=self.restored,
            log_omegas=self.log_omegas,
            data={"phases": [vars(phase) for phase in self.phases]},
        )
        self.trainer.add_callback(callback)
        try:
            yield callback
        finally:
            self.trainer.remove_callback(callback)

    def _train(self, stage: Literal["warmup", "final"], callback: SeamCallback) -> dict[str, float]:
        """One call of the trainer; the phase's cost is counted on its first micro-batch before it starts."""
        trainer = self.trainer
        cost = measure_step(trainer) if self.measure else None
        first = self.driver.step if self.restored is None else max(self.driver.step, self.restored[1])
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        peak = _PeakMemory()
        began = time.perf_counter()
        with _warmup_arguments(trainer) if stage == "warmup" else contextlib.nullcontext():
            metrics = checkpoint.train_on(trainer, self.start, self.max_steps)
        if self.restored is not None and self.driver.step < self.restored[1]:  # there was no step left to train
            self.driver.load_state(*self.restored)
        callback.restored = self.restored = None
        accumulation = trainer.args.gradient_accumulation_steps
        self.phases = [p for p in self.phases if p.name != stage] + [
            PhaseResult(
                name=stage,
                steps=trainer.state.global_step - (self.driver.seam or 0 if stage == "final" else 0),
                seconds=round(time.perf_counter() - began, 3),
                micro_batch=trainer.args.per_device_train_batch_size,
                accumulation=accumulation,
                trainable_params=trainable
                + (len(self.driver.adapters) if self.driver.policy.trains_gates and stage == "warmup" else 0),
                kept_activation_bytes=None if cost is None else cost.kept_activation_bytes,
                flops_per_step=None if cost is None else cost.flops * accumulation,
                peak_memory_bytes=peak.bytes(),
            )
        ]
        callback.data = {"phases": [vars(phase) for phase in self.phases]}
        log.debug("%s: steps %d to %d", stage, first, trainer.state.global_step)
        return metrics

    def _load_end_of_warmup(self) -> None:
        """A run that died between the last step of warm-up and the seam: load, and train no further step."""
        assert self.start is not None and self.restored is not None and self.manifest is not None
        trainer = self.trainer
        trainer._load_from_checkpoint(str(self.start))
        trainer.create_optimizer()
        optimizer = self._torch_optimizer()
        assert optimizer is not None
        optimizer.load_state_dict(torch.load(self.start / "optimizer.pt", map_location="cpu", weights_only=True))
        self.driver.load_state(*self.restored)
        self.phases = [PhaseResult(**phase) for phase in self.manifest.data.get("phases", [])]
        self.restored = None

    def _seam(self, callback: SeamCallback) -> Path:
        """Surgery on the live model, then a checkpoint of the new structure for the trainer to go on from."""
        trainer, driver = self.trainer, self.driver
        step = driver.step
        if step != driver.seam:
            raise ScheduleError(
                f"training stopped at step {step}, before the seam at {driver.seam}; something else ended it"
                " (early stopping?): lower warmup_steps, or resume"
            )
        optimizer = self._torch_optimizer()
        assert optimizer is not None
        driver.operate(optimizer)
        callback.stage = "final"
        source = self.output_dir / f"checkpoint-{step}"
        target = checkpoint.write_seam(
            source,
            self.output_dir / f"seam-{step}",
            trainer.model,
            optimizer,
            callback.manifest(step),
            trainer._train_batch_size,
        )
        if trainer.args.save_strategy == "no":
            shutil.rmtree(source)
        if self.own_optimizer:
            # The trainer builds a new one over the survivors and loads the remapped state into it, as it would in a new process.
            old = [id(p) for group in optimizer.param_groups for p in group["params"]]
            trainer.optimizer = None
            trainer.create_optimizer()
            new = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
            if old != new:
                raise AssertionError("the rebuilt optimizer orders its parameters differently from the remapped one")
        else:
            trainer.optimizer = optimizer
        trainer.model_wrapped = trainer.model
        _no_reentrant_checkpointing(trainer)
        return target

    def _torch_optimizer(self) -> torch.optim.Optimizer | None:
        optimizer = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _set_batch(self, phase: int) -> None:
        split = self.batches[phase]
        if split is not None:
            args = self.trainer.args
            args.per_device_train_batch_size, args.gradient_accumulation_steps = split
            self.trainer._train_batch_size = args.train_batch_size


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, as the trainer will count them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    with isolated_rng():
        return int(trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1])


def measure_step(trainer: Trainer) -> StepCost | None:
    """Count the cost of the first micro-batch, with random state and gradients given back; None where there is no batch."""
    with isolated_rng():
        batch = next(iter(trainer.get_train_dataloader()), None)
        if batch is None:
            return None
        trainer.model.train()
        inputs = trainer._prepare_inputs(batch)

        def loss() -> torch.Tensor:
            # accelerate wraps autocast around the model only inside train(); measured here, it must be on as well.
            with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
                return trainer.compute_loss(trainer.model, dict(inputs))

        return step_cost(trainer.model, loss)


def _split_batch(trainer: Trainer, micro_batch: int | None) -> tuple[int, int] | None:
    """(micro-batch, accumulation) with the trainer's effective batch, or a ConfigError."""
    if micro_batch is None:
        return None
    args = trainer.args
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if micro_batch < 1 or effective % micro_batch:
        fits = [size for size in range(1, effective + 1) if effective % size == 0]
        raise ConfigError(
            f"a micro-batch of {micro_batch} does not divide the effective batch of {effective}; use one of {fits}"
        )
    return micro_batch, effective // micro_batch


def _check_trainer(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("DeepSpeed and FSDP are not supported yet; run on one process or with plain DDP")
    if trainer.model_init is not None:
        raise ConfigError("model_init rebuilds the model inside train(); give the trainer a finished model instead")
    if trainer.train_dataset is None:
        raise ConfigError("the trainer has no train_dataset; give it one")


@contextlib.contextmanager
def _warmup_arguments(trainer: Trainer) -> Iterator[None]:
    """Arguments that must differ until T: the whole state is saved at T, and no earlier model is loaded back there."""
    args = trainer.args
    before = args.load_best_model_at_end, args.save_only_model
    args.load_best_model_at_end = args.save_only_model = False
    try:
        yield
    finally:
        args.load_best_model_at_end, args.save_only_model = before


def _no_reentrant_checkpointing(trainer: Trainer) -> None:
    """Reentrant checkpointing gives no gradient to a block whose input needs none, which is the lowest live block now."""
    args = trainer.args
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        settings = getattr(args, key, None)
        if isinstance(settings, dict) and settings.get("use_reentrant"):
            log.info(
                "%s: use_reentrant is False after the seam, so that the backward pass can end at the lowest adapter",
                key,
            )
            setattr(args, key, {**settings, "use_reentrant": False})


class _PeakMemory:
    """Peak bytes on the CUDA device since creation; None elsewhere, where no allocator keeps count."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def _train_plain(trainer: Trainer, method: Method, resume: bool | str | Path, measure: bool) -> FitResult:
    """A method without adapters (full fine-tuning): the trainer as it is, measured."""
    if has_adapters(trainer.model):
        raise AdapterError(f"method {method.name!r} trains the plain model; give the trainer a model without adapters")
    start = checkpoint.resolve(resume, Path(trainer.args.output_dir), manifest=False)
    steps = planned_steps(trainer)
    cost = measure_step(trainer) if measure else None
    peak, began = _PeakMemory(), time.perf_counter()
    metrics = checkpoint.train_on(trainer, start, steps)
    accumulation = trainer.args.gradient_accumulation_steps
    phase = PhaseResult(
        name="final",
        steps=trainer.state.global_step,
        seconds=round(time.perf_counter() - began, 3),
        micro_batch=trainer.args.per_device_train_batch_size,
        accumulation=accumulation,
        trainable_params=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        kept_activation_bytes=None if cost is None else cost.kept_activation_bytes,
        flops_per_step=None if cost is None else cost.flops * accumulation,
        peak_memory_bytes=peak.bytes(),
    )
    return FitResult(
        model=trainer.model,
        method=method,
        selection=None,
        phases=(phase,),
        metrics=metrics,
        max_steps=steps,
        seam_step=None,
        log_history=tuple(trainer.state.log_history),
    )


__all__ = ["FitResult", "PhaseResult", "fit", "measure_step", "planned_steps"]

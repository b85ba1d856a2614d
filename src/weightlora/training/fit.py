"""``fit(trainer, method)``: two calls of the trainer's own ``train``, with surgery between them."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer

from weightlora.cost.measure import PeakMemory
from weightlora.errors import CheckpointError, ConfigError, ScheduleError
from weightlora.graft import (
    Manifest,
    PathName,
    check_groups,
    moved_by,
    reshape,
    tie,
)
from weightlora.methods import AdapterMethod, Method, PlainMethod, TunerMethod
from weightlora.training import checkpoint
from weightlora.training.borrowed import borrowed
from weightlora.training.budget import allow
from weightlora.training.callback import SeamCallback
from weightlora.training.driver import Driver
from weightlora.training.finite import naming_the_last_good
from weightlora.training.global_batch import GlobalBatch, averages
from weightlora.training.held_out import hold_out
from weightlora.training.identity import Run, check_folder, enter_folder
from weightlora.training.initial import check_checkpoints
from weightlora.training.order import DataOrder
from weightlora.training.plain import train_plain
from weightlora.training.predict import Predictor
from weightlora.training.preflight import check_best, check_fit, check_trainers_model, torch_optimizer
from weightlora.training.processes import check_same_everywhere, main_alone, processes
from weightlora.training.results import FitResult, PhaseResult, phase_result, read_progress
from weightlora.training.resuming import OptimizerOrder, load_optimizer, set_rates, trainers_optimizer
from weightlora.training.sharding import (
    as_data_parallel,
    asked_for,
    check_method,
    check_sharding,
    leave_to_fsdp,
    shard_base,
    to_device,
)
from weightlora.training.trainer import (
    check_trainer,
    checkpoint_as_in_training,
    going_on,
    planned_steps,
    split_batch,
    step_counted,
    unwrap,
    use_batch,
    warmup_arguments,
)
from weightlora.training.unreached import naming_unreached
from weightlora.training.whole_run import Losses, WholeRun

log = logging.getLogger("weightlora")


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
        made = _Fit(trainer, method, resume, overwrite, micro_batches, measure, log_omegas, engine)
        with naming_the_last_good(made.output_dir), as_data_parallel(trainer, sharded=made.sharded):
            try:
                return made.run(select_only)
            finally:
                made.driver.let_go()


class _Fit:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        trainer: Trainer,
        method: AdapterMethod,
        resume: bool | str | Path,
        overwrite: bool,
        micro_batches: tuple[int | None, int | None],
        measure: bool,
        log_omegas: Literal["summary", "all"],
        engine: PathName,
    ) -> None:
        # Transformers types a trainer's model and optimizer as optional; by now they are there.
        self.trainer: Any = trainer
        self.method, self.measure, self.log_omegas = method, measure, log_omegas
        self.output_dir = Path(str(trainer.args.output_dir))
        self.sharded = asked_for(trainer) is not None and processes() > 1
        if self.sharded:
            to_device(trainer)
        tensors, begun = self._begin(resume, overwrite)
        held_out = hold_out(trainer, method.needs.held_out)
        allowed = allow(trainer, method, micro_batches, stock=engine == "stock", sharded=self.sharded)
        self.batches = [split_batch(trainer, size) for size in allowed.micro_batches]
        self.max_steps = planned_steps(trainer)
        model: Any = trainer.model
        self.driver = Driver(model, method, self.max_steps, engine=engine, held_out=held_out, budget=allowed.budget)
        if trainer.optimizer is not None and self.driver.seam is not None:
            check_groups(torch_optimizer(trainer.optimizer))
        self.order = DataOrder(trainer)
        check_checkpoints(trainer, self.driver.name, resumed=self.manifest is not None)
        self.phases: list[PhaseResult] = []
        new = Run.new(method, model)
        self.base = new.base
        self.restored: tuple[dict[str, torch.Tensor], int] | None = None
        self.ordered: OptimizerOrder | None = None
        self.spent = 0.0  # seconds of the current phase in earlier processes
        if self.manifest is not None:
            self._check_same_run(self.manifest, tensors)
        setup = self.driver.policy.setup
        formed = setup.gates != "none" or setup.form is not None
        if trainer.args.load_best_model_at_end and self.driver.seam is None and formed:
            raise ConfigError(
                f"{method.name} decides only at the end, so an earlier checkpoint cannot be loaded back as the best;"
                " set load_best_model_at_end=False"
            )
        if self.sharded:
            check_method(method, self.driver.policy, moved_by(model, self.driver.name))
            self.measure = False  # of a whole model there is nothing to count
            shard_base(trainer)
        split = any(split is not None for split in self.batches)
        if begun is None:
            averaged = (split or processes() > 1) and averages(trainer)
        else:
            averaged = begun.add_up(trainer, split, self.output_dir)
        self.batch = GlobalBatch.of(trainer, averaged)
        if resume is not False:
            with main_alone() as mine:
                if mine:
                    checkpoint.discard_after(self.output_dir, 0 if self.manifest is None else self.manifest.step)
                    checkpoint.sweep_all(self.output_dir)
        self.run_id = enter_folder(self.output_dir, self.start, self.others, new, trainer.args.device)

    def _begin(self, resume: bool | str | Path, overwrite: bool) -> tuple[dict[str, torch.Tensor], GlobalBatch | None]:
        """Find the checkpoint to go on from, and let the trainer's steps be as large as that run's."""
        self.manifest: Manifest | None = None
        self.whole = WholeRun(self.trainer)
        self.start = checkpoint.resolve(resume, self.output_dir)
        found = checkpoint.folders(self.output_dir)
        self.others = check_folder(self.output_dir, found, self.start, resume=resume, overwrite=overwrite)
        if resume is not False:
            # Each process has looked for itself.
            name = "none" if self.start is None else self.start.name
            check_same_everywhere("checkpoint", name, self.trainer.args.device)
        if self.start is None:
            return {}, None
        self.manifest, tensors = Manifest.read(self.start)
        begun = GlobalBatch.read(self.manifest.data, self.start)
        begun.keep(self.trainer, self.start)
        return tensors, begun

    def _check_same_run(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        """The checkpoint must belong to this model and method; take over what it says."""
        assert self.start is not None
        manifest.check_same_model(self.driver.adapters, self.base)
        if manifest.method != self.method.to_dict():
            raise CheckpointError(
                f"{self.start} was made with {manifest.method}, not {self.method.to_dict()};"
                " resume with the same method"
            )
        checkpoint.check_length(self.start, self.max_steps)
        self.ordered = OptimizerOrder(self.trainer, manifest.data, self.start)
        self.spent, self.phases = read_progress(manifest.data, self.start)
        self.whole.losses = Losses.read(manifest.data, self.start)
        if manifest.stage == "warmup":
            self.restored = tensors, manifest.step

    def run(self, select_only: bool) -> FitResult:
        resumed_final = self.manifest is not None and self.manifest.stage == "final"
        stock = self.driver.engine in ("stock", "reference")
        predictor = Predictor(self.trainer, self.driver, self.batches, stock) if self.measure else None
        if resumed_final:
            self._rebuild()
        else:
            self.driver.start(trainers_optimizer(self.trainer), fresh=self.manifest is None)
            if self.ordered is not None:
                self.ordered.count(self.method)
                self.ordered.follow()
            if self.driver.seam == 0:
                self.driver.operate(trainers_optimizer(self.trainer))
        unreached = naming_unreached(lambda: self.driver.survivors, lambda: self.driver.step + 1)
        with self.whole.joined(), self._callback() as callback, unreached:
            if not resumed_final and self.driver.seam:
                use_batch(self.trainer, self.batches[0])
                self._train("warmup", callback)
                use_batch(self.trainer, self.batches[1])
                self.start = self._seam(callback)
            use_batch(self.trainer, self.batches[0 if self.driver.seam is None else 1])
            if not (select_only and self.driver.selection):
                self._train("final", callback)
        self.driver.finish(trainers_optimizer(self.trainer))
        return FitResult(
            model=self.trainer.model,
            method=self.method,
            selection=self.driver.selection,
            phases=tuple(self.phases),
            metrics=dict(self.whole.metrics or {}),
            max_steps=self.max_steps,
            seam_step=self.driver.seam,
            adapter_params=dict(self.driver.counts),
            predicted={} if predictor is None else predictor.phases(self.driver.selection),
            frontier=() if predictor is None else tuple(predictor.frontier(self.driver.selection)),
            log_history=tuple(self.trainer.state.log_history),
        )

    def _rebuild(self) -> None:
        """Give the model the structure of the checkpoint before the trainer loads it."""
        assert self.manifest is not None
        assert self.manifest.selection is not None
        driver, selection = self.driver, self.manifest.selection
        assert self.ordered is not None
        self.ordered.count(self.method)
        reshape(
            driver.model,
            {c.name: c.rank for c in selection.kept},
            {c.name: c.scale for c in selection.kept},
            driver.name,
        )
        tie(driver.model, selection.groups, driver.name)
        self.ordered.follow()
        driver.selection, driver.step = selection, self.manifest.step
        driver.settle()
        self._follow_placement()
        driver.counts = dict(self.manifest.data.get("adapter_params", {}))
        driver.ride()

    def _data(self) -> dict[str, Any]:
        """What a manifest says beside structure and step."""
        return {"phases": [vars(phase) for phase in self.phases], "batch": self.batch.to_dict()}

    @contextlib.contextmanager
    def _callback(self) -> Iterator[SeamCallback]:
        callback = SeamCallback(
            self.trainer,
            self.driver,
            restored=self.restored,
            log_omegas=self.log_omegas,
            base=self.base,
            run=self.run_id,
            data=self._data(),
        )
        callback.losses = self.whole.losses
        self.trainer.add_callback(callback)
        try:
            yield callback
        finally:
            self.trainer.remove_callback(callback)

    def _train(self, stage: Literal["warmup", "final"], callback: SeamCallback) -> None:
        """One call of the trainer; the phase's cost is counted on its first micro-batch before it starts."""
        trainer = self.trainer
        if self.sharded:
            leave_to_fsdp(trainer.model)
        set_rates(trainer, self.method)
        if self.measure:
            checkpoint_as_in_training(trainer)
            self.driver.settle()
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        until = self.driver.seam if stage == "warmup" and self.driver.seam else self.max_steps
        inside: Any = warmup_arguments if stage == "warmup" else going_on
        changed = inside(trainer) if self.driver.seam else contextlib.nullcontext()
        call = self.whole.call(stage == "final", self.spent + sum(p.seconds for p in self.phases if p.name != stage))
        begun = 0 if self.start is None else checkpoint.whole(self.start) or 0
        with changed, call, step_counted(trainer, self.measure) as seen, self.order.over(self.start, begun):
            if self.driver.gates is not None:
                self.driver.gates.omega.grad = None  # what counting left there
            peak = PeakMemory()
            callback.spent, callback.began = self.spent, time.perf_counter()
            checkpoint.train_on(trainer, self.start, until)
        if self.restored is not None and self.driver.step < self.restored[1]:
            # The last process died after the last step of this phase: there was nothing to train, only to load.
            self.driver.load_state(*self.restored)
            assert self.start is not None
            load_optimizer(trainer, self.start)
        callback.restored = self.restored = None
        steps = trainer.state.global_step - (self.driver.seam or 0 if stage == "final" else 0)
        gates = len(self.driver.adapters) if self.driver.policy.setup.gates == "learn" and stage == "warmup" else 0
        done = phase_result(trainer, stage, steps, callback.seconds(), trainable + gates, seen.cost, peak)
        self.phases = [p for p in self.phases if p.name != stage] + [done]
        callback.data, self.whole.losses = self._data(), callback.losses
        callback.spent, callback.began, self.spent = 0.0, None, 0.0

    def _seam(self, callback: SeamCallback) -> Path:
        """Surgery on the live model, then a checkpoint of the new structure for the trainer to go on from."""
        trainer, driver = self.trainer, self.driver
        step = driver.step
        if step != driver.seam:
            raise ScheduleError(
                f"training stopped at step {step}, before the seam at {driver.seam}; something else ended it"
                " (early stopping?): lower select_after, or resume"
            )
        optimizer = trainers_optimizer(self.trainer)
        assert optimizer is not None
        driver.operate(optimizer)
        self._follow_placement()
        callback.stage = "final"
        source = self.output_dir / f"checkpoint-{step}"
        if self.start is not None and checkpoint.whole(self.start) == step:
            source = self.start  # resumed at the very end of warm-up, perhaps from another place
        target = self.output_dir / f"seam-{step}"
        with main_alone() as mine:  # all have written their random states into the source by now
            if mine:
                checkpoint.write_seam(
                    source,
                    target,
                    trainer.model,
                    optimizer,
                    callback.manifest(step),
                    self.run_id,
                    trainer._train_batch_size,
                )
                if trainer.args.save_strategy == "no" and source.parent == self.output_dir:
                    shutil.rmtree(source)
        trainer.optimizer = optimizer  # carried over, and loaded from that checkpoint as in a new process
        unwrap(trainer)
        return target

    def _follow_placement(self) -> None:
        """What was placed within a memory budget was placed for one micro-batch."""
        selection = self.driver.selection
        size = None if selection is None or selection.placement is None else selection.placement["micro_batch"]
        if size is not None:
            self.batches[1] = split_batch(self.trainer, size)
            use_batch(self.trainer, self.batches[1])


__all__ = ["FitResult", "PhaseResult", "fit"]

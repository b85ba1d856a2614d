"""A prepared run while it runs: warm-up, the seam, the final phase. Each phase is one call of ``trainer.train``."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from weightlora.cost.measure import PeakMemory
from weightlora.errors import ScheduleError
from weightlora.graft.surgery import reshape
from weightlora.training import checkpoint
from weightlora.training.callback import SeamCallback
from weightlora.training.identity import enter_folder
from weightlora.training.inside import Inside, instead, model_of
from weightlora.training.order import DataOrder
from weightlora.training.predict import Predictor
from weightlora.training.prepare import Prepared, Start
from weightlora.training.processes import main_alone
from weightlora.training.results import FitResult, PhaseResult, phase_result
from weightlora.training.resuming import load_optimizer, set_rates, trainers_optimizer
from weightlora.training.sharding import leave_to_fsdp, shard_base
from weightlora.training.trainer import (
    checkpoint_as_in_training,
    split_batch,
    step_counted,
    unwrap,
    use_batch,
)
from weightlora.training.unreached import naming_unreached
from weightlora.training.whole_run import WholeRun


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps with one structure. ``arguments``: of the trainer, which are others while it lasts."""

    name: Literal["warmup", "final"]
    begins: int
    ends: int
    gates: int
    arguments: Mapping[str, object]


class Running:
    """A run between its first step and its last: what its phases hand on to each other.

    Args:
        prepared: what will happen.
        measure, log_omegas: as ``fit``.
    """

    def __init__(self, prepared: Prepared, *, measure: bool, log_omegas: Literal["summary", "all"]) -> None:
        self.prepared, self.log_omegas = prepared, log_omegas
        self.trainer, self.driver = prepared.trainer, prepared.driver
        self.measure = measure and not prepared.sharded  # of a whole model there is nothing to count then
        self.whole, self.order = WholeRun(self.trainer), DataOrder(self.trainer)
        self.splits = list(prepared.splits)
        start = prepared.start
        self.folder = None if start is None else start.folder  # the checkpoint that the next phase goes on from
        self.phases: list[PhaseResult] = [] if start is None else list(start.phases)
        self.spent = 0.0 if start is None else start.seconds  # seconds of the next phase in earlier processes
        self.restored = None if start is None or start.after_the_seam else (start.tensors, start.manifest.step)
        self.whole.losses = None if start is None else start.losses

    def enter(self, *, resumed: bool) -> None:
        """Take the output folder, and shard the base: the first things that are seen outside."""
        prepared = self.prepared
        if prepared.sharded:
            shard_base(self.trainer)
        if resumed:
            with main_alone() as mine:
                if mine:
                    step = 0 if prepared.start is None else prepared.start.manifest.step
                    checkpoint.discard_after(prepared.output_dir, step)
                    checkpoint.sweep_all(prepared.output_dir)
        device = self.trainer.args.device
        self.run = enter_folder(prepared.output_dir, self.folder, prepared.others, prepared.run, device)

    def train(self, *, select_only: bool) -> FitResult:
        """All phases that are left, and what came of them."""
        driver, start = self.driver, self.prepared.start
        stock = driver.engine in ("stock", "reference")
        predictor = Predictor(self.trainer, driver, self.prepared.splits, stock) if self.measure else None
        self._arrange()
        unreached = naming_unreached(lambda: driver.survivors, lambda: driver.step + 1)
        with self.whole.joined(), self._callback() as callback, unreached:
            if driver.seam and (start is None or not start.after_the_seam):
                use_batch(self.trainer, self.splits[0])
                self._phase(self._warmup(driver.seam), callback)
                use_batch(self.trainer, self.splits[1])
                self.folder = self._seam(callback)
            use_batch(self.trainer, self.splits[0 if driver.seam is None else 1])
            if predictor is not None:
                predictor.tell(driver.selection)
            if not (select_only and driver.selection):
                self._phase(self._final(), callback)
        driver.finish(trainers_optimizer(self.trainer))
        return FitResult(
            model=model_of(self.trainer),
            method=self.driver.method,
            selection=driver.selection,
            phases=tuple(self.phases),
            metrics=dict(self.whole.metrics or {}),
            max_steps=self.prepared.max_steps,
            seam_step=driver.seam,
            adapter_params=dict(driver.counts),
            predicted={} if predictor is None else predictor.phases(driver.selection),
            frontier=() if predictor is None else tuple(predictor.frontier(driver.selection)),
            log_history=tuple(self.trainer.state.log_history),
        )

    def _arrange(self) -> None:
        """Give the model the structure that the next phase trains, a checkpoint's where there is one."""
        start, order = self.prepared.start, self.prepared.order
        if start is not None and start.after_the_seam:
            self._rebuild(start)
            return
        self.driver.start(trainers_optimizer(self.trainer), fresh=start is None)
        if order is not None:
            order.count(self.driver.method)
            order.follow()
        if self.driver.seam == 0:
            self.driver.operate(trainers_optimizer(self.trainer))

    def _rebuild(self, start: Start) -> None:
        """The structure of a checkpoint after the seam, before the trainer loads it."""
        driver, selection, order = self.driver, start.manifest.selection, self.prepared.order
        assert selection is not None
        assert order is not None
        order.count(self.driver.method)
        reshape(driver.model, selection, driver.name)
        order.follow()
        driver.selection, driver.step = selection, start.manifest.step
        driver.settle()
        self._follow_placement()
        driver.counts = dict(start.manifest.data.get("adapter_params", {}))
        driver.ride()

    def _warmup(self, seam: int) -> Phase:
        learned = self.driver.policy.setup.gates == "learn"
        gates = len(self.driver.adapters) if learned else 0
        # The whole state is saved at the seam, by a strategy that the callback may change, and no earlier model is
        # loaded back there.
        strategy = self.trainer.args.save_strategy
        arguments = {"load_best_model_at_end": False, "save_only_model": False, "save_strategy": strategy}
        return Phase(name="warmup", begins=0, ends=seam, gates=gates, arguments=arguments)

    def _final(self) -> Phase:
        seam, ends = self.driver.seam or 0, self.prepared.max_steps
        arguments = {"eval_on_start": False} if seam else {}  # what belongs at the start of a run was done there
        return Phase(name="final", begins=seam, ends=ends, gates=0, arguments=arguments)

    def _phase(self, phase: Phase, callback: SeamCallback) -> None:
        """One call of the trainer; the phase's cost is counted on its first micro-batch before it starts."""
        trainer, driver, model = self.trainer, self.driver, model_of(self.trainer)
        if self.prepared.sharded:
            leave_to_fsdp(model)
        set_rates(trainer, self.driver.method)
        if self.measure:
            checkpoint_as_in_training(trainer)
            driver.settle()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        earlier = self.spent + sum(p.seconds for p in self.phases if p.name != phase.name)
        call = self.whole.call(phase.name == "final", earlier)
        begun = 0 if self.folder is None else checkpoint.whole(self.folder) or 0
        counted, order = step_counted(trainer, self.measure), self.order.over(self.folder, begun)
        with instead(trainer.args, **phase.arguments), call, counted as seen, order:
            if driver.gates is not None:
                driver.gates.omega.grad = None  # what counting left there
            peak = PeakMemory()
            callback.spent, callback.began = self.spent, time.perf_counter()
            checkpoint.train_on(trainer, self.folder, phase.ends)
        if self.restored is not None and driver.step < self.restored[1]:
            # The last process died after the last step of this phase: there was nothing to train, only to load.
            driver.load_state(*self.restored)
            assert self.folder is not None
            load_optimizer(trainer, self.folder)
        callback.restored = self.restored = None
        steps = trainer.state.global_step - phase.begins
        done = phase_result(trainer, phase.name, steps, callback.seconds(), trainable + phase.gates, seen.cost, peak)
        self.phases = [p for p in self.phases if p.name != phase.name] + [done]
        callback.data, self.whole.losses = self._data(), callback.losses
        callback.spent, callback.began, self.spent = 0.0, None, 0.0

    def _seam(self, callback: SeamCallback) -> Path:
        """Surgery on the live model, then a checkpoint of the new structure for the trainer to go on from."""
        trainer, driver, output_dir = self.trainer, self.driver, self.prepared.output_dir
        step = driver.step
        if step != driver.seam:
            raise ScheduleError(
                f"training stopped at step {step}, before the seam at {driver.seam}; something else ended it"
                " (early stopping?): lower select_after, or resume"
            )
        optimizer = trainers_optimizer(trainer)
        assert optimizer is not None
        driver.operate(optimizer)
        self._follow_placement()
        callback.stage = "final"
        source, target = output_dir / f"checkpoint-{step}", output_dir / f"seam-{step}"
        if self.folder is not None and checkpoint.whole(self.folder) == step:
            source = self.folder  # resumed at the very end of warm-up, perhaps from another place
        with main_alone() as mine:  # all have written their random states into the source by now
            if mine:
                manifest, size = callback.manifest(step), Inside(trainer).batch_size
                checkpoint.write_seam(source, target, model_of(trainer), optimizer, manifest, self.run, size)
                if trainer.args.save_strategy == "no" and source.parent == output_dir:
                    shutil.rmtree(source)
        trainer.optimizer = optimizer  # carried over, and loaded from that checkpoint as in a new process
        unwrap(trainer)
        return target

    def _follow_placement(self) -> None:
        """What was placed within a memory budget was placed for one micro-batch."""
        selection = self.driver.selection
        size = None if selection is None or selection.placement is None else selection.placement["micro_batch"]
        if size is not None:
            self.splits[1] = split_batch(self.trainer, size)
            use_batch(self.trainer, self.splits[1])

    def _data(self) -> dict[str, object]:
        """What a manifest says beside structure and step."""
        return {"phases": [asdict(phase) for phase in self.phases], "batch": self.prepared.batch.to_dict()}

    @contextlib.contextmanager
    def _callback(self) -> Iterator[SeamCallback]:
        callback = SeamCallback(
            self.trainer,
            self.driver,
            restored=self.restored,
            log_omegas=self.log_omegas,
            base=self.prepared.run.base,
            run=self.run,
            data=self._data(),
        )
        callback.losses = self.whole.losses
        self.trainer.add_callback(callback)
        try:
            yield callback
        finally:
            self.trainer.remove_callback(callback)

"""The driver as a Transformers callback: forwards events, stops at the seam, stores what a resume needs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from weightlora.graft.manifest import Manifest
from weightlora.graft.optimizer import check_groups, group_names
from weightlora.training import checkpoint
from weightlora.training.driver import Driver
from weightlora.training.identity import RUN, Run
from weightlora.training.preflight import check_optimizer, torch_optimizer
from weightlora.training.resuming import made_optimizer
from weightlora.training.whole_run import InnerCallback, Losses

Stage = Literal["warmup", "final"]


class SeamCallback(InnerCallback):
    """Added last, so that it sees what the trainer's own flow decided (log, evaluate, save) in the same event.

    Args:
        trainer: whose ``log`` takes the gates.
        driver: the run's decisions.
        restored: tensors of the checkpoint that this stage resumes from, if it is one of warm-up.
        log_omegas: "summary" (how many live, extremes) or "all" (one entry per adapter).
        data: what else the manifest must hold.
        base: the base model's fingerprint.
        run: what checkpoints say of whose they are.
    """

    def __init__(
        self,
        trainer: Trainer,
        driver: Driver,
        *,
        restored: tuple[dict[str, Tensor], int] | None,
        log_omegas: Literal["summary", "all"],
        data: dict[str, object],
        base: str,
        run: Run,
    ) -> None:
        self.trainer, self.driver, self.restored = trainer, driver, restored
        self.log_omegas, self.data, self.base, self.run = log_omegas, data, base, run
        self.stage: Stage = "final" if driver.selection is not None else "warmup"
        self._at_epoch_end = False
        self._stored: int | None = None  # the step whose checkpoint has our files
        # When the current phase began in this process, and the seconds that earlier processes spent in it.
        self.began: float | None = None
        self.spent = 0.0
        self.losses: Losses | None = None  # of the last checkpoint

    def seconds(self) -> float:
        """Seconds of the current phase so far, over all processes of the run."""
        return round(self.spent + (0.0 if self.began is None else time.perf_counter() - self.began), 3)

    def manifest(self, step: int) -> Manifest:
        """Structure and progress as they are now."""
        driver = self.driver
        assert self.losses is not None  # noted wherever something is stored
        return Manifest(
            stage=self.stage,
            step=step,
            adapter=driver.name,
            adapters=Manifest.describe(driver.adapters),
            method=driver.method.to_dict(),
            selection=driver.selection,
            base=self.base,
            data={
                **self.data,
                "losses": self.losses.to_dict(),
                "seconds": self.seconds(),
                "adapter_params": driver.counts,
                "optimizer": group_names(made_optimizer(self.trainer), driver.model),
            },
        )

    def _lr_factor(self) -> float:
        trainer = self.trainer
        base_lrs = getattr(trainer.lr_scheduler, "base_lrs", None)
        base = float(base_lrs[0] if base_lrs else trainer.args.learning_rate)
        return float(trainer.optimizer.param_groups[0]["lr"]) / base if base else 0.0  # type: ignore[union-attr]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        # A trainer may make its optimizer itself, and only when it begins.
        optimizer = torch_optimizer(self.trainer.optimizer)
        check_optimizer(self.driver.model, optimizer, self.driver.name)
        if self.stage == "warmup" and self.driver.seam is not None:
            check_groups(optimizer)
        # The trainer has loaded its checkpoint by now: B is there in its folded form, so the raw state goes on top.
        if self.restored is not None:
            self.driver.load_state(*self.restored)
        self.driver.expect_gradients(compiled=args.torch_compile)

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **_: object) -> None:
        self.driver.before_step(self._lr_factor())

    def on_optimizer_step(self, args: object, state: object, control: object, **given: object) -> None:
        self.driver.after_step(self._lr_factor(), torch_optimizer(given["optimizer"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._check_finite(control)
        if control.should_log and self.stage == "warmup" and self.driver.gates is not None:
            self._log_omegas()
            # Logging took the mark off, but the trainer's own entry (loss, learning rate) is still due.
            control.should_log = True
        if self.stage == "warmup" and state.global_step == self.driver.seam:
            # At the end of an epoch the trainer may still evaluate; to stop after that keeps its random state in order.
            if state.epoch is not None and float(state.epoch).is_integer():
                self._at_epoch_end = True
            else:
                self._stop(args, control)
        if control.should_save:
            self._store(args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._check_finite(control)
        if self._at_epoch_end:
            self._at_epoch_end = False
            self._stop(args, control)
        elif control.should_training_stop and self.stage == "warmup" and state.global_step == self.driver.seam:
            # The loop was left in the middle of an epoch: what the flow callback planned for its end is not due.
            control.should_log = control.should_evaluate = control.should_save = False
        if control.should_save:
            self._store(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # save_strategy="best" decides after on_step_end; everything else was stored before the trainer wrote its files.
        if self._stored != state.global_step:
            self._store(args, state)
        if self.stage == "warmup" and state.global_step == self.driver.seam:
            # With save_total_limit=1 the trainer would end by deleting this checkpoint for an earlier, better one.
            state.best_model_checkpoint = None
        if state.is_world_process_zero:
            checkpoint.seal(self._folder(args, state))

    def _check_finite(self, control: TrainerControl) -> None:
        """Where the trainer is about to read numbers from the device; before anything bad is logged or saved."""
        if control.should_log or control.should_save or control.should_evaluate:
            self.driver.finite.check()

    @staticmethod
    def _stop(args: TrainingArguments, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True
        if args.save_strategy == SaveStrategy.BEST:
            # The trainer would think again about saving, after an evaluation in this very step. `fit` puts "best" back.
            args.save_strategy = SaveStrategy.STEPS

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def _store(self, args: TrainingArguments, state: TrainerState) -> None:
        self.driver.finite.check()
        self._stored, self.losses = state.global_step, Losses.of(self.trainer)
        if state.is_world_process_zero:
            tensors = self.driver.state() if self.stage == "warmup" else {}
            self.manifest(state.global_step).write(self._folder(args, state), tensors)
            self.run.write(self._folder(args, state) / RUN)

    def _log_omegas(self) -> None:
        omegas = self.driver.omegas()
        logs = {
            "omega/alive": float(sum(omega != 0 for omega in omegas)),
            "omega/max": max(omegas),
            "omega/min": min(omegas),
        }
        if self.log_omegas == "all":
            logs |= {f"omega/{a.name}": omega for a, omega in zip(self.driver.adapters, omegas, strict=True)}
        self.trainer.log(logs)

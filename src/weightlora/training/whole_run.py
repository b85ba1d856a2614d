"""Several calls of a trainer's ``train`` as one run: what callbacks hear, and what losses and rates are means over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.decoding import decode_part
from weightlora.errors import CheckpointError
from weightlora.training.inside import Inside, instead
from weightlora.training.processes import mean_over_processes

EVENTS = ("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end")
# What a run changes for its own purposes; a callback that looks at the start sees what the user set.
ARGUMENTS = ("load_best_model_at_end", "save_only_model", "eval_on_start")
RATES = ("train_samples_per_second", "train_steps_per_second")
LARGEST = 2.0**100  # of a loss in a manifest


class InnerCallback(TrainerCallback):
    """A callback of this package: it hears of every call of ``train``."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The sum of all steps' losses: ``total`` up to step ``logged``, the last that was logged, ``since`` after it.

    Means over the processes.
    """

    total: float
    since: float
    logged: int

    @classmethod
    def of(cls, trainer: Trainer) -> Losses:
        """As they will be once the trainer has logged what is due at this step."""
        total, since, logged = Inside(trainer).losses()
        mean_over_processes(since)
        found = cls(total=total, since=since.item(), logged=logged)
        step = trainer.state.global_step
        if not trainer.control.should_log or step <= found.logged:
            return found
        return cls(total=found.total + found.since, since=0.0, logged=step)

    @classmethod
    def read(cls, data: Mapping[str, object], where: Path) -> Losses:
        """What a manifest's data say.

        Raises:
            CheckpointError: they are damaged.
        """
        found: Losses = decode_part(cls, data, "losses", where)
        for number in (found.total, found.since, found.logged):
            if not abs(number) < LARGEST:
                raise CheckpointError(f"{where}: the manifest is damaged: {number!r} is no loss and no step")
        return found

    def to_dict(self) -> dict[str, object]:
        """For the manifest."""
        return asdict(self)

    def put(self, trainer: Trainer) -> None:
        """Let the trainer go on adding up from here, over a run that began at step 0."""
        Inside(trainer).begin_with(float(self.total), self.since, int(self.logged))


class WholeRun:
    """Lets calls of ``train``, of which each goes on where the one before ended, look like a single one.

    Callbacks hear of the start once and of the end once, and of an epoch in which one call ends and the next begins as
    of one epoch. The line of metrics that a call logs at its end is logged once, for the run.

    Args:
        trainer: its callbacks and its ``log`` go through here while :meth:`joined` lasts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.arguments = {name: getattr(trainer.args, name) for name in ARGUMENTS}
        self.losses: Losses | None = None  # of the checkpoint that the next call goes on from
        self.earlier = 0.0  # seconds of the run before this call
        self.last = True  # whether this call ends the run
        self.begun = self.ended = self.joining = False
        self.metrics: dict[str, float] | None = None

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """While it lasts; at its end the run has ended, unless it failed."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        self.log, self.told = trainer.log, {name: getattr(handler, name) for name in EVENTS}
        with instead(trainer, log=self._log), instead(handler, **{name: getattr(self, f"_{name}") for name in EVENTS}):
            yield
            if self.begun and not self.ended:  # the run ended where another call might have gone on
                self.log(self.metrics)  # type: ignore[arg-type]  # a call has ended, so there are some
                trainer.control = self._on_train_end(trainer.args, trainer.state, trainer.control, last=True)

    @contextlib.contextmanager
    def call(self, last: bool, earlier: float) -> Iterator[None]:
        """One call of ``train``: whether it ends the run, and after how many seconds of it."""
        args = self.trainer.args
        self.last, self.earlier = last, earlier
        # Those that have heard the run begin are alive, and hold more than was saved.
        restore = args.restore_callback_states_from_checkpoint and not self.begun
        with instead(args, restore_callback_states_from_checkpoint=restore):
            yield

    def _log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and "train_runtime" in logs:  # what a call says at its end
            seconds = logs["train_runtime"]
            logs["train_runtime"] = round(seconds + self.earlier, 4)
            for name in RATES:
                if name in logs and logs["train_runtime"]:
                    logs[name] = round(logs[name] * seconds / logs["train_runtime"], 3)
            self.metrics = logs
            if not self.last:
                return
        if start_time is None:
            self.log(logs)
        else:
            self.log(logs, start_time - self.earlier)

    def _on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> TrainerControl:
        if self.losses is not None:
            self.losses.put(self.trainer)
        self.joining = self.begun
        if self.begun:
            return self._inner("on_train_begin", args, state, control, **given)
        self.begun = True
        with instead(args, **self.arguments):
            return self.told["on_train_begin"](args, state, control, **given)

    def _on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        last: bool = False,
        **given: object,
    ) -> TrainerControl:
        if not (self.last or last):
            return self._inner("on_train_end", args, state, control, **given)
        self.ended = True
        return self.told["on_train_end"](args, state, control, **given)

    def _on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> TrainerControl:
        goes_on = self.joining and not float(state.epoch or 0).is_integer()
        self.joining = False
        tell = self._inner if goes_on else self._all
        return tell("on_epoch_begin", args, state, control, **given)

    def _on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> TrainerControl:
        broken_off = not self.last and control.should_training_stop and not float(state.epoch or 0).is_integer()
        tell = self._inner if broken_off else self._all
        return tell("on_epoch_end", args, state, control, **given)

    def _all(self, event: str, *args: object, **given: object) -> TrainerControl:
        return self.told[event](*args, **given)

    def _inner(self, event: str, *args: object, **given: object) -> TrainerControl:
        """Tell none but the callbacks of this package."""
        handler = self.trainer.callback_handler
        with instead(handler, callbacks=[each for each in handler.callbacks if isinstance(each, InnerCallback)]):
            return self.told[event](*args, **given)

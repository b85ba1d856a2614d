"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from weightlora.training.whole_run import InnerCallback

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

EVALUATION_EVERY = 10.0  # seconds between two words on an evaluation

LOGGER = logging.getLogger("weightlora")


class Progress(InnerCallback):
    """One bar over both phases; in a log file, a line now and then (at most about thirty a run).

    Args:
        title: stands before the bar.
        stream: where to write; default: standard error.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream = title, stream or sys.stderr
        self.bar: tqdm[object] | None = None
        self.last: dict[str, float] = {}
        self.began, self.first_step = time.monotonic(), 0
        self.evaluated, self.evaluation_began, self.told = 0, 0.0, 0.0
        self.handler = _Lines(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        # The clock starts anew with each phase, because a step after the seam takes less time than one before.
        self.began, self.first_step = time.monotonic(), state.global_step
        if self.bar is None and self.stream.isatty():
            # A terminal may not know its own size; tqdm would show nothing then.
            known = os.get_terminal_size(self.stream.fileno()).columns > 0
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                file=self.stream,
                dynamic_ncols=known,
                ncols=None if known else 80,
            )
            LOGGER.addHandler(self.handler)
            LOGGER.propagate = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif state.global_step % max(1, state.max_steps // 30) == 0 or state.global_step == state.max_steps:
            done = state.global_step - self.first_step
            left = (time.monotonic() - self.began) / max(done, 1) * (state.max_steps - state.global_step)
            loss = f"  loss {self.last['loss']:.4f}" if "loss" in self.last else ""
            self.say(f"{self.title}: step {state.global_step}/{state.max_steps}{loss}  about {left:.0f} s left")

    def on_prediction_step(
        self, args: object, state: TrainerState, control: object, eval_dataloader: DataLoader | None = None, **_: object
    ) -> None:
        total = len(eval_dataloader)  # type: ignore[arg-type]  # the trainer always gives it
        now = time.monotonic()
        if not self.evaluated:
            self.evaluation_began = self.told = now  # the first batch is done
        self.evaluated += 1
        if self.evaluated > 1 and now - self.told > EVALUATION_EVERY:  # short ones end before anybody wonders
            left = (now - self.evaluation_began) / (self.evaluated - 1) * (total - self.evaluated)
            said = f"evaluating, batch {self.evaluated}/{total}  about {left:.0f} s left"
            if self.bar is not None:
                self.bar.set_postfix_str(said)
            else:
                self.say(f"{self.title}: {said}")
            self.told = now

    def on_evaluate(self, args: object, state: object, control: object, **_: object) -> None:
        self.evaluated = 0

    def on_log(
        self, args: object, state: object, control: object, logs: dict[str, float] | None = None, **_: object
    ) -> None:
        self.last |= {key: value for key, value in (logs or {}).items() if key in ("loss", "omega/alive")}
        if self.bar is not None and self.last:
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in self.last.items()})

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            LOGGER.removeHandler(self.handler)
            LOGGER.propagate = True


class _Lines(logging.Handler):
    """Log messages above the bar instead of in the middle of it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say(record.getMessage())

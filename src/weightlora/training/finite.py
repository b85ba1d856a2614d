"""NaN and infinity are noticed on the device at every step, and read where the host waits for the device anyway."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import DivergedError, ScheduleError
from weightlora.graft.selection import Selection
from weightlora.training import checkpoint
from weightlora.training.identity import RUN, Run

REMEDY = (
    "try a lower learning rate, a longer warm-up of it, max_grad_norm=1.0, bf16 or fp32 in place of fp16, and look for"
    " broken values in the data"
)


class FiniteWatch:
    """Remembers the first step whose gradients were not all finite: one number on the device, no synchronisation.

    A NaN or infinite loss has such gradients, and one such step makes parameters NaN for good.

    Args:
        model: its parameters that train are looked at; call :meth:`renew` when others do.

    >>> layer = nn.Linear(1, 1)
    >>> watch = FiniteWatch(layer)
    >>> layer(torch.tensor([math.nan])).sum().backward()
    >>> watch.see(7); watch.first()
    7
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._first: Tensor | None = None
        self.renew()

    def renew(self) -> None:
        """Look anew for what trains."""
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def gradients(self) -> list[Tensor]:
        """Of all that trains in the model, as they are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def see(self, step: int, *others: Tensor) -> None:
        """Look at the gradients of `step` (from 1), and at other tensors."""
        grads = [*self.gradients(), *(tensor for tensor in others if tensor.numel())]
        if not grads:
            return
        largest = get_total_norm([grad.detach() for grad in grads], norm_type=math.inf)
        if self._first is None:
            self._first = torch.zeros((), dtype=torch.long, device=largest.device)
        self._first = torch.where(torch.isfinite(largest) | (self._first > 0), self._first, step)

    def first(self) -> int | None:
        """The first bad step, or None; waits for the device."""
        step = 0 if self._first is None else int(self._first)
        return step or None

    def check(self) -> None:
        """Raise DivergedError if there was a bad step; waits for the device."""
        step = self.first()
        if step is not None:
            raise DivergedError(f"the loss or a gradient became NaN or infinite at step {step}; {REMEDY}", step=step)


def check_numbers(what: str, numbers: Sequence[float | None]) -> None:
    """Raise DivergedError if one of what a selection is made from is not finite."""
    bad = [number for number in numbers if number is not None and not math.isfinite(number)]
    if bad:
        raise DivergedError(
            f"{len(bad)} of {len(numbers)} {what} are NaN or infinite at the selection; {REMEDY}", step=None
        )


def check_learned(selection: Selection, *, gates: bool) -> None:
    """Refuse a choice among adapters that nothing tells apart, because none of them has learned.

    Args:
        selection: what was decided, not applied yet.
        gates: whether gates were trained; then those are what was ranked where there is no score.

    Raises:
        ScheduleError: some are to be removed, and all scores are 0, or all gates as they were at the start.
    """
    scores = [choice.score for choice in selection.choices]
    what = "scores are 0" if None not in scores else "gates are where they began" if gates else ""
    idle = not any(scores) if None not in scores else all(c.omega in (0.0, 1.0) for c in selection.choices)
    if what and idle and selection.k < selection.n:
        raise ScheduleError(
            f"all {selection.n} {what} at the seam: no adapter has learned anything, so there is nothing to choose by;"
            " raise select_after (in the first step of a learning rate's warm-up the rate is 0), train longer, or check"
            " that the loss depends on the adapters"
        )


@contextlib.contextmanager
def naming_the_last_good(output_dir: Path, *, manifest: bool = True) -> Iterator[None]:
    """Add to a DivergedError which checkpoint is still good: none is written once a number is not finite."""
    try:
        yield
    except DivergedError as error:
        good = checkpoint.latest(output_dir, manifest=manifest)
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint from before"
        raise DivergedError(f"{error}; {where}", step=error.step) from None


class FiniteCallback(TrainerCallback):
    """The watch of a trainer without a driver; its checkpoints say whose they are, and are sealed."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.watch = FiniteWatch(trainer.model)  # type: ignore[arg-type]  # there by now
        self.run = run

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.watch.see(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self.watch.check()
        if control.should_save:
            self._name(args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        folder = self._name(args, state)  # save_strategy="best" decides late
        if state.is_world_process_zero:
            checkpoint.seal(folder)

    def _name(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            self.run.write(folder / RUN)
        return folder

"""Counting a step while the trainer itself computes it: nothing is run that would not have run anyway."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Trainer

from weightlora.cost.measure import KeptTensors, StepCost, counting
from weightlora.errors import AdapterError
from weightlora.training.inside import instead

log = logging.getLogger("weightlora")


class Observed:
    """``cost``: of the first micro-batch that was computed; None before, and where it could not be counted."""

    def __init__(self) -> None:
        self.cost: StepCost | None = None


@contextlib.contextmanager
def first_step(trainer: Trainer) -> Iterator[Observed]:
    """Count the first micro-batch that the trainer computes inside, from its loss to the end of its backward pass.

    The trainer's own ``training_step`` and ``compute_loss`` run, once, as ever; both are the trainer's again after it.
    """
    seen, stepping, losing = Observed(), contextlib.ExitStack(), contextlib.ExitStack()
    step: Callable[..., Tensor] = trainer.training_step
    loss: Callable[..., object] = trainer.compute_loss
    counts: list[tuple[_Operations, int]] = []

    def observed_step(*args: object, **kwargs: object) -> Tensor:
        stepping.close()
        with contextlib.ExitStack() as stack:

            def observed_loss(*args: object, **kwargs: object) -> object:
                losing.close()
                operations, kept = stack.enter_context(_Operations()), KeptTensors(trainer.model)  # type: ignore[arg-type]
                stack.callback(kept.let_go)
                with kept.hooks():
                    value = loss(*args, **kwargs)
                with _told():
                    counts.append((operations, kept.bytes()))
                return value

            with losing:
                losing.enter_context(instead(trainer, compute_loss=observed_loss))
                value = step(*args, **kwargs)
        with _told():
            for operations, kept in counts:
                seen.cost = StepCost(kept_activation_bytes=kept, flops=operations.counted())
        return value

    with stepping:
        stepping.enter_context(instead(trainer, training_step=observed_step))
        yield seen


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        with counting():
            yield
    except AdapterError as error:
        log.warning("costs are not counted: %s", error)


class _Operations(TorchDispatchMode):
    """Adds up floating point operations by torch's own formulas, without the module tracking of its counter."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.error: AdapterError | None = None

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            try:
                with counting():
                    self.total += formula(*args, **kwargs, out_val=out)
            except AdapterError as error:
                self.error = error
        return out

    def counted(self) -> int:
        """All so far."""
        if self.error is not None:
            raise self.error
        return int(self.total)

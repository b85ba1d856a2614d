"""WeightLoRA in a loop of your own: one object, one call per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.depth import BackwardDepth
from weightlora.graft.fast import PathName
from weightlora.graft.optimizer import check_groups
from weightlora.graft.selection import Selection
from weightlora.methods import AdapterMethod, Method
from weightlora.training.driver import UNKNOWN_LENGTH, Driver
from weightlora.training.held_out import HeldOutBatches
from weightlora.training.preflight import check_method, check_model, count, torch_optimizer
from weightlora.training.processes import check_alike

LOOK_EVERY = 10  # steps between reading what the device saw: the trainer's own logging step is as often by default


class Tuner:
    """Carry a method through a loop of your own; :func:`attach` makes it.

    Call :meth:`step` after ``optimizer.step()`` and before ``optimizer.zero_grad()``.

    ``tuner.selection`` is None during warm-up and the :class:`~weightlora.graft.selection.Selection` afterwards.
    """

    def __init__(self, driver: Driver, optimizer: torch.optim.Optimizer) -> None:
        self._driver, self._given, self._optimizer = driver, optimizer, torch_optimizer(optimizer)
        if driver.seam is not None:
            check_groups(self._optimizer)
        self._peak = [group.get("initial_lr", group["lr"]) for group in self._optimizer.param_groups]
        self._armed = False
        self._alike: Selection | bool | None = False  # the structure whose gradients were last compared; None: all
        self._depth: BackwardDepth | None = None  # as the seam found it
        driver.start(self._optimizer)
        # Withholding a gradient must come after clipping and before the optimizer looks: this hook is that moment.
        self._hook = self._optimizer.register_step_pre_hook(self._before)
        if driver.seam == 0:
            self._operate()

    def _operate(self) -> Selection:
        self._depth = BackwardDepth(self._driver.model)
        selection = self._driver.operate(self._optimizer)
        self._driver.expect_gradients()
        return selection

    def _lr_factor(self) -> float:
        group, peak = self._optimizer.param_groups[0], self._peak[0]
        return float(group["lr"]) / float(group.get("initial_lr", peak)) if group.get("initial_lr", peak) else 0.0

    def _before(self, *_: object) -> None:
        self._armed = True
        if self._alike is not self._driver.selection:
            check_alike(self._driver.finite.gradients(), self._driver.step + 1)
            self._alike = self._driver.selection
        self._driver.before_step(self._lr_factor())

    def step(self) -> Selection | None:
        """Count one optimizer step; the seam happens inside the call that reaches it.

        Returns:
            The selection in the call that made it, else None.

        Raises:
            ScheduleError: ``optimizer.step()`` was not called since the last ``tuner.step()``. (While Accelerate's
                optimizer accumulates, its ``step`` does nothing, and this one counts nothing.)
            AdapterError: at the first step after the seam no gradient reaches a survivor.
            DivergedError: a gradient became NaN or infinite. Every step is watched on the device; what was seen is
                read at every tenth step, at the seam, in :meth:`state_dict` and in :meth:`finish`.
        """
        if not self._armed and self._waits():
            return None
        if not self._armed:
            raise ScheduleError("tuner.step() counts optimizer steps; call it once after each optimizer.step()")
        self._armed = False
        self._driver.after_step(self._lr_factor(), self._optimizer)
        if self._driver.step % LOOK_EVERY == 0:
            self._driver.finite.check()
        if self._driver.selection is None and self._driver.step == self._driver.seam:
            return self._operate()
        return None

    def _waits(self) -> bool:
        """Whether Accelerate's wrapper has passed over the optimizer's step, as it does until gradients are whole."""
        return isinstance(self._given, AcceleratedOptimizer) and not self._given.gradient_state.sync_gradients

    @property
    def selection(self) -> Selection | None:
        """What was kept; None until the seam."""
        return self._driver.selection

    @property
    def omegas(self) -> dict[str, float]:
        """The gates now, by module name (after the seam: what was folded in)."""
        if self.selection is not None:
            return {choice.name: choice.omega for choice in self.selection.choices}
        return dict(zip((a.name for a in self._driver.adapters), self._driver.omegas(), strict=True))

    def finish(self) -> Selection:
        """End the run: select now if the method has not yet, and leave a plain PEFT model.

        Gradient checkpointing, and the hooks that let inputs require gradients, are again as the seam found them.
        """
        self._hook.remove()
        depth = self._depth or BackwardDepth(self._driver.model)
        selection = self._driver.finish(self._optimizer)
        depth.restore()
        return selection

    def state_dict(self) -> dict[str, object]:
        """Give progress and tensors, to save beside your own checkpoint until the seam; DivergedError if one is NaN."""
        self._driver.finite.check()
        return {"step": self._driver.step, "tensors": self._driver.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back, after model and optimizer were loaded."""
        self._driver.load_state(state["tensors"], state["step"])


def attach(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    *,
    max_steps: int | None = None,
    engine: PathName = "auto",
    held_out: Sequence[Mapping[str, object]] = (),
) -> Tuner:
    """Put a method on a model and its optimizer, in a training loop of your own.

    Under several processes wrap the model in ``DistributedDataParallel`` after this call, and again when
    :meth:`Tuner.step` returns a selection: parameters were replaced. Gradients that differ between processes
    are refused.

    Args:
        model: a model with LoRA adapters (``peft.get_peft_model``).
        method: for example ``WeightLoRA(k=10, select_after=100)``.
        optimizer: holds the adapters' parameters; at the seam it is changed in place. It may come from
            ``accelerator.prepare``; then call ``tuner.step()`` after each of its steps, also while it accumulates.
        max_steps: optimizer steps of the whole run; needed only if the method has settings that are shares of it.
        engine: the code that computes the adapters, as in :func:`fit`.
        held_out: batches that the loop does not train on, for methods that need some; they are used as
            ``model(**batch).loss``. (:func:`fit` holds out training rows itself.)

    Returns:
        A :class:`Tuner`.

    Raises:
        AdapterError, ConfigError, ScheduleError: the method cannot run, the adapters cannot train, or the optimizer
            does not hold all of them; nothing was changed.

    >>> import weightlora as wl
    >>> from peft import LoraConfig, get_peft_model
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> tuner = wl.attach(model, wl.WeightLoRA(k=1, select_after=3), optimizer)
    >>> for _ in range(5):
    ...     model(torch.randn(16, 4)).pow(2).mean().backward()
    ...     optimizer.step(); selection = tuner.step(); optimizer.zero_grad()
    >>> tuner.selection.k
    1
    """
    check_method(method)
    if not isinstance(method, AdapterMethod):
        raise ScheduleError(f"{method.name} uses no adapters, so attach has nothing to do; train the model without it")
    given, optimizer = optimizer, torch_optimizer(optimizer)
    check_model(model, optimizer)
    if method.shares and max_steps is None:
        raise ScheduleError(
            f"{method.shares[0]} is a share of the run; give attach(..., max_steps=N), or a number of steps"
        )
    if isinstance(given, AcceleratedOptimizer) and given.scaler is not None:
        raise ConfigError("fp16 training scales the gradients that gates and scores are computed from; use bf16")
    steps = UNKNOWN_LENGTH if max_steps is None else count("max_steps", max_steps)
    unseen = HeldOutBatches(model, held_out) if held_out else None
    return Tuner(Driver(model, method, steps, engine=engine, held_out=unseen), given)

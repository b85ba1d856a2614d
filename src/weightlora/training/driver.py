"""One run's decisions applied to a live model: what a callback and a plain loop both call."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weightlora.graft import (
    Gates,
    PathName,
    Selection,
    adapter_name,
    adapters,
    check_path,
    disconnect,
    end_backward_at_lowest,
    fast_path,
    fold,
    grow_adapters,
    parameters,
    remap,
    stock_path,
)
from weightlora.methods import Method, StepView

log = logging.getLogger("weightlora")


class Driver:
    """Carries a method's policy through the steps of a run and performs its surgery.

    Args:
        model: a model with LoRA adapters; taken over from here on.
        method: what is wanted.
        max_steps: optimizer steps of the whole run.
        name: PEFT's adapter name; default: the active one.
        adapter_path: how adapters compute, as :func:`weightlora.fit`.

    Raises:
        AdapterError, ConfigError, ScheduleError: before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        max_steps: int,
        name: str | None = None,
        adapter_path: PathName = "auto",
    ) -> None:
        self.model, self.method, self.adapter_path = model, method, adapter_path
        self.engine = check_path(adapter_path)
        self.name = adapter_name(model, name)
        self.adapters = adapters(model, self.name)
        self.policy = method.begin(self.adapters, max_steps)
        self.gates: Gates | None = None
        self.selection: Selection | None = None
        self.step = 0

    @property
    def seam(self) -> int | None:
        """The optimizer step after which surgery happens; 0: before training; None: never."""
        return self.policy.seam

    def start(self, *, fresh: bool = True) -> None:
        """Attach gates where the method needs them. ``fresh``: also set initial values (not when resuming)."""
        self._factors = tuple(parameters(self.model, self.name).values())
        if fresh:
            self.policy.prepare(self._factors)
        if self.policy.gated:
            self.gates = Gates(self.model, self.name, trainable=self.policy.trains_gates, engine_name=self.engine)
        else:
            self.ride()

    def ride(self) -> None:
        """Put the plain adapters on the adapter path."""
        if self.adapter_path != "stock":
            fast_path(self.model, self.name, self.engine)

    def finish(self, optimizer: torch.optim.Optimizer | None) -> Selection:
        """The end of the run: select now if the method never did, and leave stock PEFT layers."""
        selection = self.selection or self.operate(optimizer)
        stock_path(self.model, self.name)
        return selection

    def _view(self, lr_factor: float) -> StepView:
        return StepView(step=self.step + 1, lr_factor=lr_factor, factors=self._factors, gates=self.gates)

    def before_step(self, lr_factor: float) -> None:
        """Call when gradients are final. Withholds the gradients of adapters that must not move (None, not zero)."""
        if self.selection is not None:
            return
        if self.gates is not None and self.gates.omega.grad is not None:
            _mean_over_processes(self.gates.omega.grad)
        self.policy.before_step(self._view(lr_factor))
        for index in self.policy.held():
            for factor in self._factors[index]:
                factor.grad = None

    def after_step(self, lr_factor: float) -> None:
        """Call when the optimizer has stepped and gradients are still there."""
        if self.selection is None:
            self.policy.after_step(self._view(lr_factor))
            if self.gates is not None:
                self.gates.omega.grad = None
        self.step += 1

    def omegas(self) -> list[float]:
        """The gates now (1 where the method has none)."""
        return [1.0] * len(self.adapters) if self.gates is None else self.gates.omega.detach().tolist()

    def operate(self, optimizer: torch.optim.Optimizer | None) -> Selection:
        """The seam: decide, disconnect, fold the gates, grow, carry the optimizer over, let backward end early.

        Args:
            optimizer: the torch optimizer that holds the adapters, changed in place; None where none exists yet.

        Returns:
            The selection, with the ranks that live on.
        """
        omegas = self.omegas()
        selection = self.policy.decide(omegas)
        growth = self.policy.growth(selection)
        if self.gates is not None:
            self.gates.detach()
            self.gates = None
        kept = set(selection.names)
        changes = disconnect(self.model, [a.name for a in self.adapters if a.name not in kept], self.name)
        changes |= fold(self.model, {c.name: c.omega for c in selection.kept}, self.name)
        if optimizer is not None:
            remap(optimizer, changes)
        if growth is not None:
            grown = grow_adapters(
                self.model, growth.ranks, self.name, mode=growth.mode, generator=growth.generator, **growth.options
            )
            if optimizer is not None:
                remap(optimizer, grown)
        removed = end_backward_at_lowest(self.model) if len(kept) < len(self.adapters) else 0
        if removed:
            log.info(
                "embeddings' outputs need no gradient any more (%d hooks removed): backward ends at the lowest adapter",
                removed,
            )
        self.selection = selection.with_ranks(adapters(self.model, self.name))
        self._factors = tuple(parameters(self.model, self.name).values())
        self.ride()
        log.info("kept %d of %d adapters: %s", selection.k, selection.n, selection.why)
        return self.selection

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed warm-up needs beside the trainer's checkpoint."""
        state = {f"policy.{key}": value for key, value in self.policy.state().items()}
        if self.gates is not None:
            state |= {f"gates.{key}": value for key, value in self.gates.raw_state().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Put :meth:`state` back, after the trainer has loaded its own checkpoint."""
        self.policy.load_state({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
        if self.gates is not None:
            self.gates.load_raw_state({k.removeprefix("gates."): v for k, v in state.items() if k.startswith("gates.")})
        self.step = step


def _mean_over_processes(grad: Tensor) -> None:
    """Under data parallelism each process has seen its own examples; all must move the gates alike.

    Omega is no parameter of the model, so the wrapper that averages the model's gradients does not know it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(grad)
        grad.div_(torch.distributed.get_world_size())

"""Flexora: whole blocks are weighed by a gate that learns from held-out rows, and only those that gain weight stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.gates import block_gates
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter, block_numbers
from weightlora.methods.base import Needs
from weightlora.methods.budgets import SpendingMethod
from weightlora.methods.checks import check_select_after
from weightlora.methods.policy import Decision, Fresh, Restarting, Setup, StepView, slope
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class Flexora(SpendingMethod):
    """One number alpha per block, from 0; every adapter of block l computes under the gate ``L softmax(alpha)_l``.

    After each step of A and B (gates fixed), Adam moves alpha downhill on held-out batches (A and B fixed). Blocks with
    alpha above 0 are kept and start again from LoRA's initial values; adapters outside blocks are kept, under gate 1.

    Args:
        select_after: length of the first stage, in optimizer steps or as a share of the run.
        alpha_lr: Adam's learning rate on alpha.
        outer_batches: held-out batches per step, one Adam step for each.
        batches: how many held-out batches there are; they take turns.
        spend: parameters of the second stage: what is kept gets ranks for them, one and the same but for one more where
            alpha is largest (`--params` sets it). None: the ranks it has.
        seed: of the generator that draws the second stage's initial values.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: Wei et al. 2024, first order as in the authors' code. Departs from that code in gating the update once
    (there the gate acts two or three times), in keeping the optimizer's state between steps, in that both stages are
    one run, and (recommended) in one outer batch after each step, where it has 8.

    >>> Flexora().alpha_lr
    0.01
    """

    name: ClassVar[str] = "flexora"
    chooses_k: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"select_after": 0.25, "outer_batches": 8},  # 1 epoch, then 3; 8 batches after each step
        "official": {"select_after": 0.25, "outer_batches": 8},
    }

    select_after: int | float = 0.15
    alpha_lr: float = setting(0.01, above=0, use="a positive rate such as 0.01")
    outer_batches: int = setting(1, least=1)
    batches: int = setting(8, least=1)
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(held_out=self.batches, grows=self.spend is not None)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> FlexoraPolicy:
        return FlexoraPolicy(self, adapters, max_steps)


class FlexoraPolicy(Restarting):
    """Alternates with the optimizer: it moves A and B, the policy moves alpha; see :class:`Flexora`."""

    def __init__(self, method: Flexora, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters, Setup(gates="set"), method.seed)
        self.method = method
        self.seam = check_select_after(method.select_after, max_steps)
        self.blocks = block_numbers(adapters)
        count = len({block for block in self.blocks if block is not None})
        if count < 2:
            raise ScheduleError(
                f"flexora chooses among transformer blocks, and the adapters are in {count}; put them into 2 or more"
            )
        self.alpha = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.alpha], lr=method.alpha_lr)

    def gate_values(self) -> Tensor:
        """The gate of every adapter, ``(n,)``, differentiable in alpha."""
        gates, one = block_gates(self.alpha), self.alpha.new_ones(())
        return torch.stack([one if block is None else gates[block] for block in self.blocks])

    def outer_gradient(self, view: StepView, index: int) -> Tensor:
        """``dL/dalpha`` on held-out batch `index`, with A and B as they are."""
        assert view.gates is not None
        assert view.held_out is not None
        inner = slope(view.held_out, index, view.gates.omega)
        with torch.enable_grad():
            (outer,) = torch.autograd.grad(self.gate_values(), self.alpha, inner.to(self.alpha))
        return outer

    def observe(self, view: StepView) -> Sequence[Fresh]:
        assert view.gates is not None
        assert view.held_out is not None
        for turn in range(self.method.outer_batches):
            index = ((view.step - 1) * self.method.outer_batches + turn) % len(view.held_out)
            self.alpha.grad = self.outer_gradient(view, index)
            self.adam.step()
            view.gates.set(self.gate_values().detach())
        self.alpha.grad = None
        return ()

    def decide(self, omegas: Sequence[float]) -> Decision:
        alphas = self.alpha.tolist()
        if not all(map(math.isfinite, alphas)) or not max(alphas) > 0:
            raise ScheduleError(
                f"no block's alpha is above 0 after {self.seam} steps; raise select_after, or change alpha_lr"
            )
        kept = [a.index for a, b in zip(self.adapters, self.blocks, strict=True) if b is None or alphas[b] > 0]
        count = sum(alpha > 0 for alpha in alphas)
        why = f"the {count} of {len(alphas)} blocks whose alpha is above 0 after {self.seam} steps"
        scores = [0.0 if block is None else alphas[block] for block in self.blocks]
        selection = self.method.choose(self.adapters, kept, why, step=self.seam, omegas=omegas, scores=scores)
        growth = self.method.grown(self.adapters, kept, scores)
        return Decision(selection=selection, growth=growth, restart=self.restart)

    def state(self) -> dict[str, Tensor]:
        moments = {f"adam.{key}": value.clone() for key, value in self.adam.state.get(self.alpha, {}).items()}
        return super().state() | {"alpha": self.alpha.detach().clone(), **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        moments = {k.removeprefix("adam."): v.clone() for k, v in state.items() if k.startswith("adam.")}
        if moments:
            self.adam.state[self.alpha] = moments

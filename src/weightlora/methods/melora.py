"""MELoRA: n small adapters side by side in every layer, a rank of n r for the parameters of rank r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightlora.core.budget import total_params
from weightlora.errors import AdapterError
from weightlora.graft.adapters import Adapter
from weightlora.graft.architectures import Blocks
from weightlora.methods.base import AdapterMethod
from weightlora.methods.policy import Factors, Fixed, HeldOut, Policy, Setup, Weights
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class MELoRA(AdapterMethod):
    """``dW = s blockdiag(B_1 A_1, ..., B_n A_n)``: slice i of x goes through mini i to slice i of y.

    The model's LoRA rank is r of each mini, its ``alpha / r`` the scale; dropout on x is each mini's own. The result
    is plain LoRA of rank n r.

    Args:
        minis: n, which divides d_in and d_out of every adapted layer.

    Raises:
        ConfigError: n is no whole number of 1 or more.
        AdapterError: (from ``begin``) n does not divide a layer; the message names it.

    Source: Ren et al. 2024, "MELoRA". Departs from it in computing with the embedded factors of rank n r, so that
    every engine and export works with them.

    >>> MELoRA(minis=4).minis
    4
    """

    name: ClassVar[str] = "melora"
    # Official: r=8, n=2 for GLUE (alpha 16), which is the default; r=1, n=8 for instruction tuning.
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {"minis": 2}, "official": {"minis": 2}}

    minis: int = setting(2, least=1)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        for adapter in adapters:
            for side, size in (("inputs", adapter.d_in), ("outputs", adapter.d_out)):
                if size % self.minis:
                    raise AdapterError(
                        f"minis={self.minis} does not divide the {size} {side} of {adapter.name};"
                        f" use a divisor of {size} or other target modules"
                    )
        why = f"every adapter lives, as {self.minis} minis each"
        setup = Setup(start=self._start, form=lambda _: Blocks(self.minis), count=self._count)
        return Fixed(adapters, self.keep_all(adapters, why), setup=setup)

    def _start(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        # PEFT has drawn A for d_in inputs; a mini has d_in / n, and Kaiming's bound goes with one over their root.
        with torch.no_grad():
            for A, _ in factors:
                A.mul_(self.minis**0.5)

    def _count(self, live: Sequence[Adapter]) -> int:
        """``sum r (d_in + d_out)`` whatever n is."""
        return total_params([a.rank // self.minis for a in live], [a.shape for a in live])

"""MiLoRA: training along the smallest singular directions of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.budget import total_params
from weightlora.core.factorise import minor_pair
from weightlora.errors import AdapterError
from weightlora.graft.adapters import Adapter
from weightlora.graft.architectures import Offset
from weightlora.methods.base import AdapterMethod
from weightlora.methods.policy import Factors, Fixed, HeldOut, Policy, Setup, Weights


@dataclass(frozen=True, kw_only=True)
class MiLoRA(AdapterMethod):
    """``y = (W - s B0 A0) x + s B A x``, ``s B0 A0`` the part of W along its r smallest singular values, where A and
    B start.

    ``B0 = U_m sqrt(S_m / s)``, ``A0 = sqrt(S_m / s) V_m^T``. The source sets alpha = r (s = 1), r = 64; here both are
    the model's ``LoraConfig``. The result is plain LoRA of rank 2 r on the untouched W.

    Source: Wang et al. 2024, "MiLoRA". Departs from it in leaving the base as it is: factors ``[A; A0]``, ``[B, -B0]``
    of rank 2 r compute the same function, for twice LoRA's adapter arithmetic. Dropout therefore also acts on
    ``-B0 A0``, and the start equals the base up to rounding.

    Raises:
        AdapterError: (before training) a rank is above min(d_in, d_out), a scale is not above 0, or a base layer is
            quantised.

    >>> MiLoRA().name
    'milora'
    """

    name: ClassVar[str] = "milora"

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        check_ranks(self.name, [a.rank for a in adapters], adapters)
        for a in adapters:
            if not a.scale > 0:
                raise AdapterError(f"{a.name} has the scale {a.scale}; milora needs lora_alpha above 0")
        why = "every adapter lives, from the smallest singular directions of its weight"

        def start(factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
            with torch.no_grad():
                for adapter, pair, W in zip(adapters, factors, weights, strict=True):
                    for factor, value in zip(pair, minor_pair(W, adapter.rank, adapter.scale), strict=True):
                        factor.copy_(value)

        def count(live: Sequence[Adapter]) -> int:
            """``sum r (d_in + d_out)``; the other half of the rank is constant."""
            return total_params([a.rank // 2 for a in live], [a.shape for a in live])

        # Offset takes the factors as `start` has left them; a resumed run puts its own in their place.
        check = partial(check_dense, self.name, adapters)
        setup = Setup(check=check, start=start, form=Offset, count=count)
        return Fixed(adapters, self.keep_all(adapters, why), setup=setup)


def check_ranks(method: str, ranks: Sequence[int], adapters: Sequence[Adapter]) -> None:
    """Refuse a rank that the weight under an adapter does not have."""
    for a, rank in zip(adapters, ranks, strict=True):
        if rank > min(a.shape):
            raise AdapterError(
                f"rank {rank} on {a.name} is more than the {min(a.shape)} singular values of its weight, from"
                f" which {method} starts; use at most {min(a.shape)}"
            )


def check_dense(method: str, adapters: Sequence[Adapter], weights: Sequence[Tensor]) -> None:
    """Refuse weights that are not stored as plain numbers."""
    plain = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for a, W in zip(adapters, weights, strict=True):
        if W.dtype not in plain or W.shape != (a.d_out, a.d_in):
            raise AdapterError(
                f"the weight of {a.name} is quantised ({W.dtype}, {tuple(W.shape)}); {method} needs its singular"
                " values: load the base in float32, bfloat16 or float16"
            )

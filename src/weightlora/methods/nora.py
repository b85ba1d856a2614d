"""NoRA: a small trained pair nested inside a frozen pair that is read off the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.factorise import major_pair
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.adapters import Adapter
from weightlora.graft.architectures import Nest
from weightlora.graft.forms import Form
from weightlora.graft.watch import input_size
from weightlora.methods.base import AdapterMethod, Needs, Shapes
from weightlora.methods.milora import check_dense, check_ranks
from weightlora.methods.policy import Factors, Fixed, HeldOut, Policy, Setup, Weights
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class NoRA(AdapterMethod):
    """``dW = s B B_in A_in A``; ``A (r, d_in)``, ``B (d_out, r)`` fixed, ``A_in (r', r)``, ``B_in (r, r')`` trained.

    ``B A`` is the best approximation of W of rank r under ``||(W - B A) S||``, ``S = diag((mean |x_j|)^exponent)`` over
    batches that the run does not train on; without such batches ``S = 1``. ``B_in = 0`` at the start. The model's LoRA
    rank is r', which is also the rank of the plain LoRA that results; s stays the model's ``alpha / r'`` (the source
    divides by r).

    Args:
        outer_rank: r, from r' to min(d_in, d_out). None: 4 r', or min(d_in, d_out) where that is less.
        calibration_batches: how many batches S is taken from; 0: S = 1. The source gives no number.
        exponent: of the mean magnitude.
        seed: of A_in.

    Raises:
        ConfigError: a setting out of range.
        AdapterError: (from ``begin``) a rank that a layer does not have; (before training) a quantised base.

    Source: Lin et al. 2024, "NoRA". Departs from its released code, as the paper does, in ``B_in = 0``.

    >>> NoRA(calibration_batches=2).needs.held_out
    2
    """

    name: ClassVar[str] = "nora"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {},  # the class's own defaults; the number of batches is ours
        "official": {},
    }

    outer_rank: int | None = setting(None, least=1)
    calibration_batches: int = setting(4, least=0)
    exponent: float = setting(1.0, least=0, use="1.0, or 0.5 where inputs have outliers")
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(held_out=self.calibration_batches)

    def within(self, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[NoRA, int]:
        """The inner rank is kept where it can be: ``r = params / (2 n r')``, and ``r' <= r <= min(d_in, d_out)``."""
        each = params // (2 * max(1, len(shapes)))  # r r' of one layer
        if each < 1:
            raise ConfigError(
                f"{params} parameters are too few for nora of rank 1 on {len(shapes)} layers; use at least"
                f" {2 * len(shapes)}"
            )
        least = min(min(shape) for shape in shapes)
        inner = min(rank, isqrt(each), least)
        return replace(self, outer_rank=min(each // inner, least)), inner

    def outer(self, adapter: Adapter) -> int:
        """r of one adapter."""
        return min(4 * adapter.rank, *adapter.shape) if self.outer_rank is None else self.outer_rank

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        check_ranks(self.name, [a.rank for a in adapters], adapters)
        check_ranks(self.name, [self.outer(a) for a in adapters], adapters)
        for a in adapters:
            if self.outer(a) < a.rank:
                raise AdapterError(
                    f"outer_rank={self.outer_rank} is below the rank {a.rank} of {a.name}; use {a.rank} or more"
                )
        why = "every adapter lives, nested in a frozen pair"
        outer = [self.outer(a) for a in adapters]

        def start(factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
            sizes: list[Tensor | None] = [None] * len(weights)
            if self.calibration_batches and held_out is not None:
                seen = [held_out.watch(index, input_size) for index in range(len(held_out))]
                means = [[size / max(1.0, float(count)) for size, count in batch] for batch in seen]
                sizes = [torch.stack(layer).mean(0) ** self.exponent for layer in zip(*means, strict=True)]
            with torch.no_grad():
                for pair, r, W, size in zip(factors, outer, weights, sizes, strict=True):
                    for factor, value in zip(pair, major_pair(W, r, size), strict=True):
                        factor.copy_(value)

        def form(factors: Factors) -> Form:
            generator = torch.Generator().manual_seed(self.seed)
            return Nest(outer, [a.rank for a in adapters], generator=generator, device=factors[0][0].device)

        def count(live: Sequence[Adapter]) -> int:
            """``sum 2 r r'``, whatever d is."""
            return sum(2 * outer[index] * a.rank for index, a in enumerate(live))

        ranks = [(r, a.scale) for r, a in zip(outer, adapters, strict=True)]
        check = partial(check_dense, self.name, adapters)
        setup = Setup(check=check, ranks=ranks, start=start, form=form, count=count)
        return Fixed(adapters, self.keep_all(adapters, why), setup=setup)

"""PLoP: adapters on the kinds of modules whose weights are least aligned with what goes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.graft.adapters import Adapter
from weightlora.graft.watch import feature_alignment
from weightlora.methods.placements.once import SeeingPlacement
from weightlora.methods.policy import HeldOut
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class PLoP(SeeingPlacement):
    """The `kinds` kinds of modules, in all blocks, with the lowest ``NFN = mean ||W z|| sqrt(d_in) / (||W||_F ||z||)``.

    A weight that answers its inputs as it would answer noise (1) has learned little for them. The score is ``-NFN``.

    Args:
        kinds: how many kinds of modules; all, where there are fewer.
        batches: held-out batches that are looked at.
        spend, seed: as for the other placements.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: Hayou et al. 2025, "PLoP" (arXiv 2506.20629). Departs in the noise, whose mean is known in closed form and
    not drawn; norms are means over a batch's tokens, padding included.

    >>> PLoP(kinds=2).needs.held_out
    8
    """

    name: ClassVar[str] = "plop"

    kinds: int = setting(3, least=1)

    def measure(self, adapters: Sequence[Adapter], weights: Iterator[Tensor], held_out: HeldOut | None) -> list[float]:
        assert held_out is not None
        seen = [held_out.watch(index, feature_alignment) for index in range(len(held_out))]
        found: list[float] = (-torch.stack(seen).mean(0)).tolist()
        return found

    def keep(self, adapters: Sequence[Adapter], scores: Sequence[float]) -> tuple[Sequence[int], str]:
        members: dict[str, list[float]] = {}
        for adapter, score in zip(adapters, scores, strict=True):
            members.setdefault(adapter.role, []).append(score)
        of_kind = {kind: sum(found) / len(found) for kind, found in members.items()}
        best = sorted(of_kind, key=lambda kind: -of_kind[kind])[: self.kinds]
        why = f"{', '.join(best)}: the {len(best)} of {len(of_kind)} kinds least aligned with their inputs"
        return [a.index for a in adapters if a.role in best], why

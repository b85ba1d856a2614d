"""DomLoRA: one adapter, where the energy of the first gradients is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightlora.methods.baselines import OneShotGradient
from weightlora.methods.weightlora.worth import GradientEnergy, Worth


@dataclass(frozen=True, kw_only=True)
class DomLoRA(OneShotGradient):
    """The adapter with the largest ``PAGE_i = sum_t ||dL_t/dB_i||_F^2`` at B = 0, and no other.

    While PAGE is summed over a few steps' batches all adapters are held at their initial values, where A has no
    gradient; then the `k` with the largest live.

    Args:
        k: a count or a share of n; 1 as published.
        batches: how many optimizer steps to look at. They count as training steps (a head learns in them).

    Source: Zhang et al. 2026, "Rethinking Adapter Placement" (arXiv 2605.06183). Departs in summing over batches in
    place of single examples, on the run's own first batches.

    >>> DomLoRA().k
    1
    """

    name: ClassVar[str] = "domlora"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {"k": 1}, "official": {"k": 1}}
    worth: ClassVar[type[Worth]] = GradientEnergy

    k: int | float = 1

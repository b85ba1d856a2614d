"""KappaTune: adapters where the weight's singular values are most alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from weightlora.core.published import condition_number
from weightlora.graft.adapters import Adapter
from weightlora.methods.budgets import CountMethod, ranked
from weightlora.methods.checks import check_k
from weightlora.methods.placements.once import OneLook
from weightlora.methods.policy import HeldOut, Policy


@dataclass(frozen=True, kw_only=True)
class KappaTune(OneLook, CountMethod):
    """The `k` adapters on the weights with the lowest ``kappa = sigma_1 / sigma_min``. No data is looked at.

    The score is ``1 / kappa``. Of a stack of experts kappa is the mean over experts.

    Args:
        k: a count or a share of n.

    Source: Ludwig 2025 (arXiv 2506.16289), and PEFT's helper ``find_kappa_target_modules``, whose share it has.
    Departs from the helper in double precision, with nothing added to ``sigma_min``.

    >>> KappaTune().k
    0.2
    """

    name: ClassVar[str] = "kappatune"

    k: int | float = 0.2

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        check_k(self.k, adapters)
        return super().begin(adapters, max_steps)

    def measure(self, adapters: Sequence[Adapter], weights: Iterator[Tensor], held_out: HeldOut | None) -> list[float]:
        return [1 / float(condition_number(weight).mean()) for weight in weights]

    def keep(self, adapters: Sequence[Adapter], scores: Sequence[float]) -> tuple[Sequence[int], str]:
        k = check_k(self.k, adapters)
        return ranked(scores)[:k], f"the {k} of {len(adapters)} weights with the lowest condition number"

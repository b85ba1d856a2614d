"""What WeightLoRA is measured against: all adapters, random ones, the deepest, and one-shot gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.projection import support
from weightlora.graft.adapters import Adapter
from weightlora.methods.base import AdapterMethod
from weightlora.methods.budgets import CountMethod
from weightlora.methods.checks import check_k, check_warmup
from weightlora.methods.policy import Decision, Fixed, Fresh, Policy, StepView
from weightlora.methods.weightlora.worth import Gradient, Worth
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterMethod):
    """Train plain LoRA on every adapter: the reference row. ``y = W x + s B A x``. Source: Hu et al. 2021."""

    name: ClassVar[str] = "lora"

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        return Fixed(adapters, self.keep_all(adapters, "plain LoRA keeps every adapter"))


@dataclass(frozen=True, kw_only=True)
class RandomAdapters(CountMethod):
    """Keep K adapters drawn uniformly before training, and remove the others: RLoRA, the paper's ablation.

    Args:
        k: a count or a share of n.
        seed: of the method's own generator, on which alone the set depends.

    Source: paper, section 4.4. Departs from the authors' code, in which some adapters could not be drawn.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        k = check_k(self.k, adapters)
        order = torch.randperm(len(adapters), generator=torch.Generator().manual_seed(self.seed)).tolist()
        why = f"{k} of {len(adapters)} drawn uniformly with seed {self.seed}"
        return Fixed(adapters, self.choose(adapters, order[:k], why, step=0), 0)


@dataclass(frozen=True, kw_only=True)
class DeepestAdapters(CountMethod):
    """Keep the K adapters in the last layers, which cost least in the backward pass. A control of ours."""

    name: ClassVar[str] = "top"

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        k, n = check_k(self.k, adapters), len(adapters)
        return Fixed(adapters, self.choose(adapters, range(n - k, n), f"the {k} deepest of {n}", step=0), 0)


@dataclass(frozen=True, kw_only=True)
class OneShotGradient(CountMethod):
    """Keep the K adapters with the largest gradients of B, before any adapter has trained. A control of ours.

    For a few steps adapters are held at B = 0 while their gradients add up; then
    ``score_i = ||sum_t dL/dB_i||_F^2 = |<dL/ddW_i, s B_i A_i>|`` after one unit step from B = 0, and the K largest
    are kept.

    Args:
        k: a count or a share of n.
        batches: number of optimizer steps to sum over. They count as training steps, because a head learns in them.

    Source: the scalar product of the paper's Figure 2, read at the first step.
    """

    name: ClassVar[str] = "gradient"
    worth: ClassVar[type[Worth]] = Gradient

    batches: int = setting(8, least=1)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> GradientPolicy:
        return GradientPolicy(self, adapters, max_steps)


class GradientPolicy(Policy):
    """Sums the gradients of B while nothing moves; see :class:`OneShotGradient`."""

    def __init__(self, method: OneShotGradient, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.method = method
        self.k = check_k(method.k, adapters)
        self.seam = check_warmup(method.batches, max_steps, "batches")
        self.held = range(len(adapters))
        self.worth = method.worth(adapters)

    def observe(self, view: StepView) -> Sequence[Fresh]:
        self.worth.add(view, last=view.step == self.seam)
        return ()

    def decide(self, omegas: Sequence[float]) -> Decision:
        scores = self.worth.scores()
        kept = support(scores, self.k, "signed")
        why = f"the {self.k} largest of {len(self.adapters)} by {self.worth.meaning}, {self.method.batches} batches"
        return Decision(selection=self.method.choose(self.adapters, kept, why, step=self.seam, scores=scores.tolist()))

    def state(self) -> dict[str, Tensor]:
        return self.worth.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.worth.load_state(state)

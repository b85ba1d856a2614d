"""WeightLoRA's settings: a weight per adapter, the K best kept. What they make of a run: `policy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

from weightlora.core.budget import k_for_params
from weightlora.core.gates import Shape
from weightlora.core.projection import Rule
from weightlora.core.sizes import parse_bytes, parse_share
from weightlora.errors import ConfigError
from weightlora.graft.adapters import Adapter
from weightlora.methods.base import AdapterMethod, Limit, Needs, Shapes
from weightlora.methods.budgets import ANY_K
from weightlora.methods.weightlora.policy import QUARTER, WeightLoRAPolicy
from weightlora.methods.weightlora.presets import WEIGHTLORA
from weightlora.methods.weightlora.worth import WORTHS, Score
from weightlora.settings import setting

AMOUNTS = ("k", "memory", "step_time", "kept", "share")  # each says how many adapters live
W = TypeVar("W", bound="WeightLoRA")


@dataclass(frozen=True, kw_only=True)
class WeightLoRA(AdapterMethod):
    """Train all n adapters for T steps, keep K of them, remove the others, and train on.

    ``min over omega, A, B of L(W_i + s omega_i B_i A_i)  subject to  ||omega||_0 <= K``

    Args:
        k: how many adapters to keep: a count (1..n), or as a float a share of n (0.25; 1.0 is all). None: give
            `memory`, `step_time`, `kept` or `share`. If none of them is given, it is ``kept="0.6x"`` under the preset
            `recommended`, and ``k=0.25`` under other presets, for omega and coverage, and if nothing can be counted
            before training (your own loop, FSDP).
        memory: instead of k, bytes that the whole run may take ("12GiB"). Of all sets that fit, the one with the
            highest total score is kept. Gates are not projected before T. Ours, a departure from the paper.
        step_time: instead of k, operations of a step after T as a share of one with all adapters ("0.7x").
        kept: instead of k, bytes kept for the backward pass after T as a share of those with all adapters ("0.6x").
            Warm-up uses smaller micro-batches, so that its peak stays within the same share.
        share: instead of k, a share of the total score (0.9): as few adapters as have it are kept.
        select_after: T in optimizer steps, or a share of the run below 1 (1.0 could be either, and is refused). None
            (``official``): gates learn to the end, and nothing is removed before the adapter is saved.
        score: what is ranked at T. "omega": the gate (paper). "credit": the first-order loss decrease that an
            adapter's own updates bought, ``c_i = -sum_t <grad_t, p_(t+1) - p_t>``. "next-credit": the same with the
            gradient of the next batch. "trapezoid": the mean of both. "gradient": no adapter moves before T, and the
            score is ``||sum_t dL/dB_t||^2``; "cross-gradient": only the part of it that different batches share.
            "integrated": at T, all gates are raised together from 0 to 1 on held-out batches, ``-int dL/domega_i``.
        coverage: spread the choice over blocks, by ``max sum_blocks sqrt(sum score_i)``.
        gate_lr: learning rate of omega's SGD; 0 holds every gate at 1.
        gate_lr_scheduled: multiply ``gate_lr`` by the run's learning-rate schedule.
        rule: which K gates survive a projection (see :func:`weightlora.core.projection.top_k`).
        project_every: steps between projections of omega, which leave K gates on; None: only at T, if omega is the
            score.
        k_schedule: how many gates a projection before T leaves on.
        drift: let Adam's momentum and weight decay move adapters whose gate is 0.
        init_A: "lora" (PEFT's scale) or "official" (sqrt(d_in / r) times larger).

    The defaults are the preset ``recommended``; ``WeightLoRA(preset="paper", k=10)`` has the paper's. Settings that you
    give override the preset's. :attr:`label` says what differs from the preset; selections and records have it.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: paper, section 3.3; scores other than omega are ours.

    >>> WeightLoRA(k=10, select_after=100).score
    'credit'
    >>> WeightLoRA(preset="paper", k=10).gate_lr
    5.0
    >>> WeightLoRA(preset="paper", score="credit").label
    'paper, changed: score'
    """

    name: ClassVar[str] = "weightlora"
    spending: ClassVar[str] = f"all n train until the seam; {ANY_K}"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = WEIGHTLORA
    in_counts: ClassVar[tuple[str, ...]] = ("k",)

    k: int | float | None = None
    memory: str | int | None = None
    step_time: str | None = None
    kept: str | None = None
    share: float | None = setting(None, above=0, most=1, use="a share of the total score, such as 0.9")
    select_after: int | float | None = 0.15
    score: Score = "credit"
    coverage: bool = False
    gate_lr: float = setting(0.0, least=0, use="0 to hold the gates at 1, or a positive rate")
    gate_lr_scheduled: bool = False
    rule: Rule = "signed"
    project_every: int | None = setting(None, least=1, use="1 or more, or None for only at T")
    k_schedule: Shape = "constant"
    drift: bool = False
    init_A: Literal["lora", "official"] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} both say how many adapters are kept; give one of them")
        if not given and (
            self.preset != "recommended" or self.score == "omega" or self.coverage or self.select_after is None
        ):
            object.__setattr__(self, "k", QUARTER)
        if self.memory is not None:
            parse_bytes(self.memory)
        for name in ("step_time", "kept"):
            if getattr(self, name) is not None:
                parse_share(getattr(self, name))
        if self.coverage and given and self.k is None:
            raise ConfigError(
                f"coverage=True spreads a number of adapters, and {given[0]} gives no number; use k, or coverage=False"
            )
        if self.limit is not None and given and self.select_after is None:
            raise ConfigError(
                f"{given[0]} limits what is kept after the choice, and select_after=None makes no choice; give"
                " select_after"
            )

    @property
    def limit(self) -> Limit | None:
        """What survivors must stay within, where no count decides."""
        if self.memory is not None:
            return Limit(kind="memory", amount=parse_bytes(self.memory), said=str(self.memory))
        if self.step_time is not None:
            return Limit(kind="step_time", amount=parse_share(self.step_time), said=self.step_time)
        if self.kept is not None:
            return Limit(kind="kept", amount=parse_share(self.kept), said=self.kept)
        if self.k is None and self.share is None:
            return Limit(kind="kept", amount=0.6, said="0.6x", assumed=True)
        return None

    @property
    def needs(self) -> Needs:
        worth = WORTHS.get(self.score)
        looks, copies = (0, 0) if worth is None else (worth.batches, worth.copies)
        return Needs(limit=self.limit, k=self.k, held_out=looks, copies=copies)

    def within(self: W, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[W, int]:
        if self.limit is not None and not self.limit.assumed:
            raise ConfigError(f"params and {self.limit.kind} both say how many adapters are kept; give one of them")
        return replace(self, k=k_for_params(params, rank, shapes)), rank

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> WeightLoRAPolicy:
        return WeightLoRAPolicy(self, adapters, max_steps)

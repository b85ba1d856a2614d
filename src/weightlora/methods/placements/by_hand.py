"""Placements made by hand: one part of every block, whatever the architecture calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.methods.placements.once import Placement
from weightlora.methods.policy import HeldOut, Policy

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OUTPUT = re.compile(r"(?:^|\.)(?:o|o_proj|out_proj|out_lin|c_proj|wo|proj|dense|to_out)$", re.IGNORECASE)
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|classifier)(?:\.|$)", re.IGNORECASE)


def part_of(adapter: Adapter) -> str:
    """Where an adapter lies in its block, by the names that Transformers' architectures have for it.

    Returns:
        "attention_output", "attention" (queries, keys, values), "feed_forward", or "other" (routers; outside blocks).

    >>> rest = {"index": 0, "kind": "", "d_in": 1, "d_out": 1, "rank": 1, "scale": 1.0}
    >>> names = ("layers.0.self_attn.o_proj", "layer.0.attention.self.query", "layer.0.output.dense", "lm_head")
    >>> [part_of(Adapter(name=n, block=None if n == "lm_head" else 0, **rest)) for n in names]
    ['attention_output', 'attention', 'feed_forward', 'other']
    """
    if adapter.block is None or _ROUTER.search(adapter.role):
        return "other"
    if _ATTENTION.search(adapter.role):
        return "attention_output" if _OUTPUT.search(adapter.role) else "attention"
    return "feed_forward"


@dataclass(frozen=True, kw_only=True)
class PartPlacement(Placement):
    """Settings of a method that keeps the part of every block that it is named after, and looks at nothing."""

    words: ClassVar[str]

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        if not any(part_of(a) == self.name for a in adapters):
            kinds = ", ".join(sorted({a.role for a in adapters}))
            raise ScheduleError(f"{self.name} keeps {self.words}, and none has an adapter; they are on {kinds}")
        return super().begin(adapters, max_steps)

    def measure(self, adapters: Sequence[Adapter], weights: Iterator[Tensor], held_out: HeldOut | None) -> list[float]:
        return [float(part_of(a) == self.name) for a in adapters]

    def keep(self, adapters: Sequence[Adapter], scores: Sequence[float]) -> tuple[Sequence[int], str]:
        kept = [a.index for a in adapters if scores[a.index]]
        kinds = ", ".join(dict.fromkeys(adapters[i].role for i in kept))
        return kept, f"{self.words} in every block: {kinds}"


@dataclass(frozen=True, kw_only=True)
class AttentionOutput(PartPlacement):
    """The attention's output projection of every block (``o_proj``), chosen without looking at the task.

    Args:
        spend, seed: as for the other placements.

    Raises:
        ScheduleError: (from ``begin``) no such layer has an adapter.

    Source: Amazon Science, "Optimizing LoRA target module selection for efficient fine tuning", where it was the best
    single kind of module.

    >>> AttentionOutput().words
    "the attention's output"
    """

    name: ClassVar[str] = "attention_output"
    words: ClassVar[str] = "the attention's output"


@dataclass(frozen=True, kw_only=True)
class FeedForward(PartPlacement):
    """All feed-forward layers of every block, experts among them but no router, chosen without looking at the task.

    Args:
        spend, seed: as for the other placements.

    Raises:
        ScheduleError: (from ``begin``) no such layer has an adapter.

    Source: Schulman et al. 2025, "LoRA Without Regret", where they alone did as well as all layers.

    >>> FeedForward().words
    'the feed-forward layers'
    """

    name: ClassVar[str] = "feed_forward"
    words: ClassVar[str] = "the feed-forward layers"

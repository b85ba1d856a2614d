"""Rules that keep or leave whole transformer blocks: by the gradients of their weights, or by what they change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.budget import resolve_k
from weightlora.core.published import linear_cka
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter, block_numbers
from weightlora.graft.watch import block_features, dense_gradients
from weightlora.methods.budgets import ranked
from weightlora.methods.placements.once import SeeingPlacement
from weightlora.methods.policy import HeldOut, Policy
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class BlockPlacement(SeeingPlacement):
    """Settings of a rule that keeps `blocks` transformer blocks: a count, or as a float a share of them.

    Adapters outside blocks are kept, with the score 0.
    """

    in_counts: ClassVar[tuple[str, ...]] = ("blocks",)
    meaning: ClassVar[str]  # of what the blocks that stay have, in words

    blocks: int | float = 0.5

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        count = len({block for block in block_numbers(adapters) if block is not None})
        if count < 2:
            raise ScheduleError(
                f"{self.name} chooses among transformer blocks and the adapters lie in {count}; put them in 2 or more"
            )
        if isinstance(self.blocks, int) and self.blocks > count:
            raise ScheduleError(f"blocks={self.blocks} is more than the {count} that have adapters; use 1..{count}")
        return super().begin(adapters, max_steps)

    @abstractmethod
    def worth(self, blocks: Sequence[int | None], held_out: HeldOut) -> list[float]:
        """The score of every block.

        Args:
            blocks: in which block each adapter lies.
            held_out: what to look at.
        """

    def measure(self, adapters: Sequence[Adapter], weights: Iterator[Tensor], held_out: HeldOut | None) -> list[float]:
        assert held_out is not None
        blocks = block_numbers(adapters)
        worth = self.worth(blocks, held_out)
        return [0.0 if block is None else worth[block] for block in blocks]

    def keep(self, adapters: Sequence[Adapter], scores: Sequence[float]) -> tuple[Sequence[int], str]:
        blocks = block_numbers(adapters)
        worth = {block: score for block, score in zip(blocks, scores, strict=True) if block is not None}
        order = ranked([worth[block] for block in range(len(worth))])
        best = order[: resolve_k(self.blocks, len(worth))]
        why = f"the {len(best)} of {len(worth)} blocks with {self.meaning}"
        return [i for i, block in enumerate(blocks) if block is None or block in best], why


@dataclass(frozen=True, kw_only=True)
class CKA(BlockPlacement):
    """The blocks that change their input most: the lowest linear CKA between what goes in and what comes out.

    ``CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centred features, a row for each held-out row. The score is
    ``1 - CKA``.

    Args:
        blocks: how many blocks stay, a count or a share.
        batches: held-out batches that are looked at.
        spend, seed: as for the other placements.

    Source: Ando et al., "Layer-wise LoRA fine-tuning: a similarity metric approach" (c2d-usp/Layer-wise-LoRA-with-CKA).
    Departs in a row's features, which are the mean over its tokens without padding: theirs are the first token of
    encoders and the last of decoders. Their encoder script leaves out the block with the lowest CKA, ours does not.

    >>> CKA(blocks=6).meaning
    'the lowest CKA between input and output'
    """

    name: ClassVar[str] = "cka"
    meaning: ClassVar[str] = "the lowest CKA between input and output"

    def worth(self, blocks: Sequence[int | None], held_out: HeldOut) -> list[float]:
        seen = [held_out.watch(index, block_features) for index in range(len(held_out))]
        pairs = [tuple(torch.cat(side) for side in zip(*block, strict=True)) for block in zip(*seen, strict=True)]
        return [1 - float(linear_cka(before, after)) for before, after in pairs]


@dataclass(frozen=True, kw_only=True)
class Aletheia(BlockPlacement):
    """The blocks with the largest gradients: ``sum over batches and the block's weights of ||dL/dW||_F``.

    Args:
        blocks: how many blocks stay, a count or a share.
        batches: held-out batches that are looked at.
        spend, seed: as for the other placements.

    Source: Saket 2026, "Aletheia" (arXiv 2604.15351). Departs in that batches take the place of single examples, that
    a block's weights are those with adapters, and that all adapters which stay have one rank.

    >>> Aletheia().batches
    5
    """

    name: ClassVar[str] = "aletheia"
    meaning: ClassVar[str] = "the largest gradients"

    batches: int = setting(5, least=1)

    def worth(self, blocks: Sequence[int | None], held_out: HeldOut) -> list[float]:
        total = [0.0] * len({block for block in blocks if block is not None})

        def see(index: int, gradient: Tensor) -> None:
            block = blocks[index]
            if block is not None:
                total[block] += float(gradient.double().norm())

        for index in range(len(held_out)):
            held_out.watch(index, partial(dense_gradients, see=see), backward=True)
        return total

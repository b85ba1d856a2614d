"""What parallel training moves between devices and holds on each: a model of the collectives, from one trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# What DDP puts into one all-reduce: torch's default, in bytes.
_BUCKET = 25 * 2**20


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How training is spread over devices.

    ``devices``: N. ``sharding``: "ddp" (every device holds everything), "fsdp" (torch's FSDP2, each block a group and
    the rest another), or "zero3" (DeepSpeed).
    """

    devices: int = 1
    sharding: str = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether a device holds an N-th of every tensor."""
        return self.devices > 1 and self.sharding != "ddp"

    def held(self, size: int) -> int:
        """Bytes of something that one device holds."""
        return math.ceil(size / self.devices) if self.sharded else size


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What each device sends in one optimizer step, in bytes (and receives as much), and in how many collectives.

    ``gathered``: parameters of others, all-gathered; ``reduced``: gradients, all-reduced or reduce-scattered.
    """

    gathered: int
    reduced: int
    gathers: int
    reductions: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.gathered + self.reduced


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a step has to move, of one phase.

    ``blocks``: bytes of the parameters of each block, ``outside``: of all others. ``lowest``: the block in which
    backward ends; its gradients, ``gradients``: of what trains in each block, ``rest``: outside, gates included.
    """

    blocks: Sequence[int]
    outside: int
    lowest: int
    gradients: Sequence[int]
    rest: int


def traffic(parallel: Parallel, moved: Moved, accumulation: int) -> Traffic:
    """Bytes and collectives of an optimizer step, in rings: a gather or a scatter of S bytes sends ``S (N - 1) / N``.

    - ddp: ``2 (N - 1) / N`` of the gradients, once a step, in buckets of 25 MiB.
    - fsdp, zero3: each forward gathers every parameter. Each backward gathers once more the blocks that gradients reach
      (zero3: and what lies outside of blocks, which FSDP keeps from forward on; FSDP: and the block below, which it
      fetches ahead). Gradients are scattered once a step.

    Args:
        parallel: devices and sharding.
        moved: sizes.
        accumulation: micro-batches of a step.

    >>> moved = Moved(blocks=[100, 100, 100, 100], outside=40, lowest=2, gradients=[0, 0, 8, 8], rest=0)
    >>> traffic(Parallel(devices=4, sharding="fsdp"), moved, 1)
    Traffic(gathered=555, reduced=12, gathers=8, reductions=2)
    >>> traffic(Parallel(devices=4), moved, 1)
    Traffic(gathered=0, reduced=24, gathers=0, reductions=1)
    """
    trained = sum(moved.gradients) + moved.rest
    share = (parallel.devices - 1) / parallel.devices
    if parallel.devices == 1:
        return Traffic(gathered=0, reduced=0, gathers=0, reductions=0)
    if not parallel.sharded:
        return Traffic(
            gathered=0, reduced=round(2 * share * trained), gathers=0, reductions=max(1, math.ceil(trained / _BUCKET))
        )
    ahead = 1 if parallel.sharding == "fsdp" else 0
    again = [size for size in moved.blocks[max(0, moved.lowest - ahead) :] if size]
    if parallel.sharding == "zero3" and moved.outside:
        again.append(moved.outside)
    pieces = [size for size in (moved.outside, *moved.blocks) if size]
    return Traffic(
        gathered=round(share * accumulation * (sum(pieces) + sum(again))),
        reduced=round(share * trained),
        gathers=accumulation * (len(pieces) + len(again)),
        reductions=sum(size > 0 for size in (*moved.gradients, moved.rest)),
    )


def beside(parallel: Parallel, moved: Moved) -> int:
    """Bytes that a device holds for a while beside its own part.

    ddp: the gradients once more, in buckets. Sharded: what lies outside of blocks, and two blocks: one in use, one
    fetched ahead.

    >>> moved = Moved(blocks=[100, 100], outside=40, lowest=0, gradients=[8, 8], rest=0)
    >>> beside(Parallel(devices=4), moved), beside(Parallel(devices=4, sharding="fsdp"), moved)
    (16, 240)
    """
    if parallel.devices == 1:
        return 0
    if not parallel.sharded:
        return sum(moved.gradients) + moved.rest
    return moved.outside + 2 * max(moved.blocks, default=0)

"""Dropout that is drawn twice from one seed, instead of being kept between forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PORTION = 1 << 16


def draw_seed(device: torch.device | None = None) -> Tensor:
    """One seed, ``()`` int64, from torch's global generator of a device (default: the CPU).

    Drawing it there makes a run repeatable by ``torch.manual_seed`` and lets checkpointing, which restores that
    generator's state, draw the same mask again. It never waits for a device.
    """
    return torch.randint(2**63 - 1, (), device=device)


def positions(count: int, p: float, seed: int) -> Tensor:
    """Which of `count` independent trials with probability `p` succeed, ascending.

    The gaps between successes of a Bernoulli process are independent and geometric,
    ``gap = floor(log(1 - u) / log(1 - p))``, so ``p * count`` numbers are drawn and not `count`: with p = 0.05 that
    makes it cheaper to draw a mask twice than to draw it once entry by entry.

    Args:
        count: number of trials.
        p: probability of one, in (0, 1].
        seed: of a generator made for this call.

    Returns:
        ``(about p * count,)`` int64, on the CPU.

    >>> positions(5, 1.0, seed=0)
    tensor([0, 1, 2, 3, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    rate = math.log1p(-p) if p < 1.0 else -math.inf
    parts, start = [torch.empty(0, dtype=torch.int64)], 0
    while start < count:
        mean = p * (count - start)
        # Enough for all but one call in a billion; in portions that stay in the processor's cache.
        draws = min(int(mean + 6.0 * math.sqrt(mean * (1.0 - p))) + 8, PORTION)
        uniform = torch.empty(draws, dtype=torch.float64).uniform_(generator=generator)
        # Each success uses up its gap of failures and itself.
        gaps = uniform.neg_().log1p_().div_(rate).clamp_(max=count).to(torch.int64)
        found = gaps.add_(1).cumsum(0).add_(start - 1)
        start = int(found[-1]) + 1
        parts.append(found[: int(torch.searchsorted(found, count))])
    return parts[1] if len(parts) == 2 else torch.cat(parts)


def drawn(like: Tensor, p: float, seed: int) -> Tensor:
    """What is dropped of a tensor as large as `like`: flat positions on the CPU, a mask elsewhere.

    The same seed, number of entries and kind of device give the same answer, whatever the dtype and number of threads.
    """
    if like.device.type == "cpu":
        return positions(like.numel(), p, seed)
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(p, generator=generator)


def drop_(t: Tensor, dropped: Tensor) -> Tensor:
    """Set what :func:`drawn` named to zero in the contiguous tensor `t`, in place. The rest is **not** scaled up.

    The factor ``1 / (1 - p)`` is the caller's: it costs nothing where another scale is applied anyway.

    >>> t = torch.ones(2, 3)
    >>> drop_(t, drawn(t, 1.0, seed=0))
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    if dropped.dtype == torch.bool:
        return t.masked_fill_(dropped, 0.0)
    t.view(-1).index_fill_(0, dropped, 0.0)
    return t

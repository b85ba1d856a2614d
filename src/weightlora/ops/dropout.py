"""Dropout that is drawn twice from one seed, instead of being kept between forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """One seed, ``()`` int64 on the CPU, from torch's global generator.

    Drawing it there makes a run repeatable by ``torch.manual_seed`` and lets checkpointing, which restores that generator's
    state, draw the same mask again. It never waits for a device.
    """
    return torch.randint(2**63 - 1, ())


def positions(count: int, p: float, seed: int) -> Tensor:
    """Which of `count` independent trials with probability `p` succeed, ascending.

    The gaps between successes of a Bernoulli process are independent and geometric,
    ``gap = floor(log(1 - u) / log(1 - p))``, so ``p * count`` numbers are drawn and not `count`: with p = 0.05 that makes
    it cheaper to draw a mask twice than to draw it once entry by entry.

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
    parts, start = [], 0
    while start < count:
        mean = p * (count - start)
        draws = int(mean + 6.0 * math.sqrt(mean * (1.0 - p))) + 8
        uniform = torch.empty(draws, dtype=torch.float64).uniform_(generator=generator)
        # Each success uses up its gap of failures and itself.
        gaps = uniform.neg_().log1p_().div_(rate).to(torch.int64)
        found = gaps.add_(1).cumsum(0).add_(start - 1)
        start = int(found[-1]) + 1
        parts.append(found[: int(torch.searchsorted(found, count))])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def drop_(t: Tensor, p: float, seed: int) -> Tensor:
    """Set each entry of the contiguous tensor `t` to zero with probability `p`, in place; the rest is **not** scaled up.

    The same seed and number of entries give the same mask, whatever the shape, dtype and number of threads. The factor
    ``1 / (1 - p)`` is the caller's: it costs nothing where another scale is applied anyway.

    >>> drop_(torch.ones(2, 3), 1.0, seed=0)
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    if t.device.type != "cpu":
        generator = torch.Generator(t.device).manual_seed(seed)
        mask = torch.empty(t.shape, dtype=torch.bool, device=t.device).bernoulli_(p, generator=generator)
        return t.masked_fill_(mask, 0.0)
    flat = t.view(-1)
    if p <= 0.5:
        flat.index_fill_(0, positions(flat.numel(), p, seed), 0.0)
        return t
    kept = positions(flat.numel(), 1.0 - p, seed) if p < 1.0 else flat.new_empty(0, dtype=torch.int64)
    values = flat[kept]
    flat.zero_()
    flat.index_copy_(0, kept, values)
    return t


def dropped(x: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """``x: (tokens, d)`` in `dtype` with :func:`drop_` applied; `x` itself when there is nothing to do."""
    if p == 0.0:
        return x.to(dtype)
    return drop_(x.to(dtype, copy=True, memory_format=torch.contiguous_format), p, seed)

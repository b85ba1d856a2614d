"""ALoRA's importance of a rank, exactly or to first order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightlora.methods.policy import StepView, slope

Scoring = Literal["exact", "gradient"]


def exact_scores(view: StepView, batch: int) -> Tensor:
    """IS of every rank that is on, ``(sum r,)`` float64; 0 for the others. Gates are left as they were."""
    assert view.held_out is not None
    gates, held_out = view.ranks, view.held_out
    found, scores = gates.values.detach().clone(), torch.zeros(len(gates.values), dtype=torch.float64)

    def quality(values: Tensor) -> float:
        gates.set(values)
        return -float(held_out.loss(batch))

    with torch.no_grad():
        try:
            whole = quality(found)
            for rank in torch.nonzero(found).flatten().tolist():
                without, alone = found.clone(), torch.zeros_like(found)
                without[rank], alone[rank] = 0.0, found[rank]
                scores[rank] = whole - quality(without) + quality(alone)
        finally:
            gates.set(found)
    return scores


def gradient_scores(view: StepView, batch: int) -> Tensor:
    """The first-order part of IS: ``-dL/dc`` with the gates as they are, plus ``-dL/dc`` with all at 0."""
    assert view.held_out is not None
    gates = view.ranks
    found = gates.values.detach().clone()
    total = -slope(view.held_out, batch, gates.values)
    try:
        gates.set(torch.zeros_like(found))
        total = total.double() - slope(view.held_out, batch, gates.values)
    finally:
        gates.set(found)
    return (total * (found != 0)).cpu()

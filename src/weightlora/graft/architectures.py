"""Forms of other LoRA architectures: minis side by side, shared factors, an offset, a nest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightlora.graft.forms import Form


class Blocks(Form):
    """MELoRA: ``A' = blockdiag(A_1..A_n)``, ``B' = blockdiag(B_1..B_n)``, of rank n r for the parameters of rank r.

    A mini ``A_i (r, d_in / n)`` is slice i of the columns of the layer's own A, ``B_i (d_out / n, r)`` slice i of the
    rows of its own B.

    Args:
        count: n, which divides d_in and d_out of every adapter.

    >>> A, B = Blocks(2).effective(0, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    >>> B @ A
    tensor([[3., 0.],
            [0., 8.]])
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def rank(self, index: int, rank: int) -> int:
        return self.count * rank

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.block_diag(*A.chunk(self.count, dim=1)), torch.block_diag(*B.chunk(self.count, dim=0))

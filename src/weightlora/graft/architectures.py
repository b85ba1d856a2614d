"""Forms of other LoRA architectures: minis side by side, shared factors, an offset, a nest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

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
        blocks: Callable[..., Tensor] = torch.block_diag
        return blocks(*A.chunk(self.count, dim=1)), blocks(*B.chunk(self.count, dim=0))


class Vectors(Form):
    """Tied-LoRA: ``A' = diag(u) A``, ``B' = diag(v) B`` with u, v of each layer and A, B that layers may share.

    Args:
        ranks: r of each adapter, in module order.
        widths: d_out of each adapter.
        device: where u and v live.

    All u are one parameter ``(sum r,)``, all v one ``(sum d_out,)``, float32, 1 at the start.

    >>> form = Vectors([1, 1], [2, 2], torch.device("cpu"))
    >>> form.parameters()["v"].data[2:] = 3.0
    >>> A, B = form.effective(1, torch.ones(1, 2), torch.ones(2, 1))
    >>> (B @ A).detach()
    tensor([[3., 3.],
            [3., 3.]])
    """

    def __init__(self, ranks: Sequence[int], widths: Sequence[int], device: torch.device) -> None:
        self.ranks, self.widths = list(ranks), list(widths)
        self.u = nn.Parameter(torch.ones(sum(ranks), device=device))
        self.v = nn.Parameter(torch.ones(sum(widths), device=device))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"u": self.u, "v": self.v}

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        u, v = torch.split(self.u, self.ranks)[index], torch.split(self.v, self.widths)[index]
        return u.unsqueeze(1).to(A.dtype) * A, v.unsqueeze(1).to(B.dtype) * B


class Offset(Form):
    """MiLoRA: ``A' = [A; A0]``, ``B' = [B, -B0]``, so ``dW = s (B A - B0 A0)`` of rank 2 r.

    Adding ``s B A`` to an edited base ``W - s B0 A0`` is the same function, but here the base stays as it is.

    Args:
        starts: ``(A0, B0)`` of each adapter; copies are kept.

    >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> form = Offset([(A, B)])
    >>> more_A, more_B = form.effective(0, A + 1, B)
    >>> more_B @ more_A
    tensor([[3., 3.]])
    """

    def __init__(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.starts = [(A.detach().clone(), B.detach().clone()) for A, B in starts]

    def constants(self) -> dict[str, Tensor]:
        return {f"{key}.{i}": t for i, pair in enumerate(self.starts) for key, t in zip("AB", pair, strict=True)}

    def rank(self, index: int, rank: int) -> int:
        return 2 * rank

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A0, B0 = self.starts[index]
        return torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], dim=1)


class Nest(Form):
    """NoRA: ``A' = A_in A``, ``B' = B B_in`` with A, B frozen: ``dW = s B B_in A_in A`` of the inner rank r'.

    Args:
        outer: r of each adapter's own A and B, in module order.
        inner: r' of each adapter.
        generator: draws ``A_in (r', r) ~ U(-1/sqrt(r), 1/sqrt(r))``; ``B_in (r, r')`` starts at zero.
        device: where they live.

    >>> form = Nest([4], [2], generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    >>> A, B = form.effective(0, torch.ones(4, 5), torch.ones(6, 4))
    >>> A.shape, B.shape, bool(B.any()), form.frozen
    (torch.Size([2, 5]), torch.Size([6, 2]), False, True)
    """

    frozen: ClassVar[bool] = True

    def __init__(
        self, outer: Sequence[int], inner: Sequence[int], *, generator: torch.Generator, device: torch.device
    ) -> None:
        self.inner: list[tuple[nn.Parameter, nn.Parameter]] = []
        for r, small in zip(outer, inner, strict=True):
            start = torch.rand(small, r, generator=generator).mul_(2).sub_(1) / r**0.5
            self.inner.append((nn.Parameter(start.to(device)), nn.Parameter(torch.zeros(r, small, device=device))))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{key}_{i}": p for i, pair in enumerate(self.inner) for key, p in zip("AB", pair, strict=True)}

    def rank(self, index: int, rank: int) -> int:
        return int(self.inner[index][0].shape[0])

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        # Detached, since PEFT lets all factors of an adapter require gradients whenever one is set active or enabled
        # again, as TRL does at every step to ask a reference.
        inner_A, inner_B = self.inner[index]
        return inner_A.to(A.dtype) @ A.detach(), B.detach() @ inner_B.to(B.dtype)

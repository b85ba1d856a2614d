"""What other papers rank layers by: spectra of weights and inputs, norms of what goes through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weightlora.core.budget import adapter_params
from weightlora.errors import ConfigError


def alignment(output_norm: Tensor, input_norm: Tensor, weight: Tensor) -> Tensor:
    r"""How much more a weight answers its inputs than noise of their size: `||W z|| / (||W||_F ||z|| / sqrt(d_in))`.

    The denominator is the root mean square of `||W z~||` for a Gaussian `z~` of z's norm, so no noise is drawn.

    Args:
        output_norm: mean over tokens of `||W z||`, a scalar, without the bias.
        input_norm: mean over tokens of `||z||`, a scalar.
        weight: W, (d_out, d_in).

    Returns:
        A scalar tensor, float64.

    Source: PLoP (arXiv 2506.20629), which adapts the module types with the lowest mean. Departure: the Gaussian's
    mean in closed form.

    >>> import torch
    >>> alignment(torch.tensor(1.0), torch.tensor(1.0), torch.eye(4))
    tensor(1., dtype=torch.float64)
    """
    noise: Tensor = weight.double().norm() * input_norm.double() / weight.shape[1] ** 0.5
    return output_norm.double() / noise


def condition_number(weight: Tensor) -> Tensor:
    r"""Largest over smallest singular value of a weight: `sigma_1 / sigma_min`.

    Args:
        weight: W, (d_out, d_in), or a stack of such.

    Returns:
        A tensor of the stack's shape, a scalar for one W, float64; infinite where W has not full rank.

    Source: KappaTune (arXiv 2506.16289), which adapts the layers with the lowest.

    >>> import torch
    >>> condition_number(torch.diag(torch.tensor([4.0, 2.0])))
    tensor(2., dtype=torch.float64)
    """
    values = torch.linalg.svdvals(weight.double())
    kappa: Tensor = values[..., 0] / values[..., -1]
    return kappa


def sensitivity(weight: Tensor, grad_W: Tensor) -> Tensor:
    r"""Mean over a weight's entries of `|W * dL/dW|`.

    Args:
        weight: W, (d_out, d_in).
        grad_W: the dense gradient, same shape.

    Returns:
        A scalar tensor, float64.

    Source: GoRA (arXiv 2502.12171), equation 5.

    >>> import torch
    >>> sensitivity(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]]))
    tensor(2., dtype=torch.float64)
    """
    return (weight.double() * grad_W.double()).abs().mean()


def linear_cka(X: Tensor, Y: Tensor) -> Tensor:
    r"""Linear centred kernel alignment of two sets of features: `||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`, centred.

    Args:
        X: (rows, p).
        Y: (rows, q).

    Returns:
        A scalar tensor in [0, 1], float64.

    Source: Kornblith et al. 2019; layers whose input and output differ most are adapted by Layer-wise LoRA with CKA.

    >>> import torch
    >>> X = torch.tensor([[0.0], [1.0], [2.0]])
    >>> linear_cka(X, 3 * X + 1)
    tensor(1., dtype=torch.float64)
    """
    X, Y = (features.double() - features.double().mean(0) for features in (X, Y))
    alike: Tensor = (Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())
    return alike


def proportional_ranks(
    importance: Sequence[float],
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    params: int | None = None,
) -> list[int]:
    r"""Ranks that follow importance: `r_i = round(b I_i / (sum I * sqrt(d_in + d_out)))`, in `r / 2 .. 4 r`.

    A rank is not above d_in or d_out either.

    Args:
        importance: I of each adapter, not negative.
        shapes: (d_in, d_out) of each.
        ranks: r of each, from which `b = sum sqrt(d_in + d_out) r`.
        params: b is the largest for which the ranks cost at most so many parameters; None: b as above.

    Raises:
        ConfigError: importance is zero everywhere, or `params` does not pay for `r / 2` everywhere.

    Source: GoRA (arXiv 2502.12171), equations 6 and 7; its bounds are 4 and 32 at r = 8.

    >>> proportional_ranks([3.0, 1.0], [(16, 16), (16, 16)], [8, 8])
    [12, 4]
    >>> proportional_ranks([3.0, 1.0], [(16, 16), (16, 16)], [8, 8], params=32 * 20)
    [15, 5]
    """
    total = sum(importance)
    if not 0 < total < math.inf:
        raise ConfigError(f"the importance of all adapters adds up to {total}; there is nothing to follow")
    roots = [math.sqrt(d_in + d_out) for d_in, d_out in shapes]
    whole = sum(root * rank for root, rank in zip(roots, ranks, strict=True))

    def at(b: float) -> list[int]:
        wanted = [round(b * part / total / root) for part, root in zip(importance, roots, strict=True)]
        return [
            max(1, rank // 2, min(want, 4 * rank, *shape))
            for want, rank, shape in zip(wanted, ranks, shapes, strict=True)
        ]

    return at(whole) if params is None else _largest(at, 4 * len(ranks) * whole, shapes, params)


def scaled_ranks(ranks: Sequence[int], shapes: Sequence[tuple[int, int]], params: int) -> list[int]:
    """Ranks made smaller alike, rounded, until they cost at most `params`; those that fit stay as they are.

    >>> scaled_ranks([4, 2, 0], [(8, 8), (8, 24), (8, 8)], 100)
    [3, 1, 0]
    """
    return _largest(lambda share: [round(share * rank) for rank in ranks], 1.0, shapes, params)


def _largest(
    at: Callable[[float], list[int]], most: float, shapes: Sequence[tuple[int, int]], params: int
) -> list[int]:
    """The ranks that `at` gives for the largest number up to `most` at which they cost at most `params`."""

    def cost(ranks: Sequence[int]) -> int:
        return sum(adapter_params(rank, *shape) for rank, shape in zip(ranks, shapes, strict=True) if rank)

    if cost(at(0.0)) > params:
        raise ConfigError(f"{params} parameters are too few for these adapters; use at least {cost(at(0.0))}")
    low, high = 0.0, most
    if cost(at(high)) <= params:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= params else (low, middle)
    return at(low)

"""What an adapter is worth: scores from gradients, and a choice that spreads over groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weightlora.core._check import check_count
from weightlora.errors import ConfigError


def credit(grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    r"""Decrease of the loss that an update bought, to first order: `-sum_j <grad_j, delta_j>`.

    Positive when the update went downhill. Summed over steps it is an adapter's credit; the gradients must be those
    taken before the update.

    Args:
        grads: gradients of an adapter's tensors, any shapes.
        deltas: what the optimizer added to the same tensors, same shapes and order.

    Returns:
        A scalar tensor on the device of the gradients, float64 if any input is, else float32.

    Raises:
        ConfigError: nothing given, or lengths or shapes differ.

    Source: first-order Taylor expansion of the loss; not in the paper.

    >>> import torch
    >>> g = torch.tensor([1.0, -2.0])
    >>> credit([g], [-0.1 * g])
    tensor(0.5000)
    """
    if not grads or len(grads) != len(deltas):
        raise ConfigError(f"{len(grads)} gradients for {len(deltas)} updates; give one update for each gradient")
    parts = []
    for grad, delta in zip(grads, deltas, strict=True):
        if grad.shape != delta.shape:
            raise ConfigError(f"gradient {tuple(grad.shape)} and update {tuple(delta.shape)} differ in shape")
        work = _work_dtype(grad, delta)
        parts.append(-(grad.to(work) * delta.to(work)).sum())
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def gate_gradient(A: Tensor, B: Tensor, grad_W: Tensor, scale: float) -> Tensor:
    r"""Gradient of the loss with respect to a gate: `s <dL/dW, B A> = s * sum((B^T dL/dW) * A)`.

    Follows from `W_eff = W + omega s B A`; it does not depend on omega and exists at omega = 0. B A, of the size of
    W, is never formed.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        grad_W: dense gradient dL/dW_eff of shape (d_out, d_in).
        scale: s, alpha / r at creation.

    Returns:
        A scalar tensor, float64 if any input is, else float32.

    Raises:
        ConfigError: the shapes do not belong together.

    Source: derivative of the paper's equation (3).

    >>> import torch
    >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    >>> gate_gradient(A, B, torch.ones(2, 2), scale=4.0)
    tensor(36.)
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or grad_W.shape != (B.shape[0], A.shape[1]):
        raise ConfigError(
            f"A {tuple(A.shape)}, B {tuple(B.shape)} and the gradient {tuple(grad_W.shape)} do not belong together; "
            "they must be (r, d_in), (d_out, r) and (d_out, d_in)"
        )
    work = _work_dtype(A, B, grad_W)
    return scale * ((B.to(work).T @ grad_W.to(work)) * A.to(work)).sum()


def one_shot(grad_B: Tensor) -> Tensor:
    r"""Score of an adapter before any training: `||dL/dB||_F^2` at B = 0.

    With G the dense gradient, `dL/dB = s G A^T`. One SGD step of learning rate 1 from B = 0 gives `B = -dL/dB`, and
    the product of the dense gradient with that first adapter is `<G, s B A> = <s G A^T, B> = -||dL/dB||_F^2`. So this
    is the absolute gradient-adapter scalar product of the paper's Figure 2 after one unit step, and it is also the
    :func:`credit` of that step (A does not move: its gradient is zero at B = 0).

    Args:
        grad_B: dL/dB of shape (d_out, r), taken at B = 0, averaged over the batches wanted before the call.

    Returns:
        A scalar tensor, float64 if the input is, else float32.

    Source: paper section 3.1, Figure 2. Departure: the paper trains first and uses the full gradient.

    >>> import torch
    >>> one_shot(torch.tensor([[3.0], [4.0]]))
    tensor(25.)
    """
    return grad_B.to(_work_dtype(grad_B)).square().sum()


def coverage(scores: Sequence[float], groups: Sequence[int], k: int) -> list[int]:
    r"""Choose k adapters with high scores, spread over groups (layers).

    Greedy maximiser of `F(S) = sum_g sqrt(sum_{i in S, group i = g} max(scores_i, 0))` over `|S| = k`. F is monotone
    and submodular, so greedy reaches at least `1 - 1/e` of the optimum (Nemhauser, Wolsey, Fisher 1978). Of equal gains
    the lowest index wins; scores at or below zero gain nothing and are taken last.

    Args:
        scores: one finite score for each adapter.
        groups: the group of each adapter, for example its layer.
        k: how many to choose, in 1..n.

    Returns:
        Sorted indices, exactly k.

    Raises:
        ConfigError: lengths differ, a score is not finite, k out of range.

    >>> coverage([4.0, 3.0, 2.5, 0.1], [0, 0, 1, 1], 2)  # plain top 2 would take both of group 0
    [0, 2]
    """
    n = len(scores)
    if len(groups) != n:
        raise ConfigError(f"{n} scores for {len(groups)} groups; give one group for each score")
    check_count("k", k, 1, n)
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ConfigError(f"scores at {bad} are not finite; training diverged before the choice")
    useful = [max(float(score), 0.0) for score in scores]
    covered = dict.fromkeys(groups, 0.0)
    chosen: set[int] = set()
    for _ in range(k):
        rest = (i for i in range(n) if i not in chosen)
        best = max(rest, key=lambda i: (_gain(covered[groups[i]], useful[i]), -i))
        chosen.add(best)
        covered[groups[best]] += useful[best]
    return sorted(chosen)


def _gain(covered: float, score: float) -> float:
    """sqrt(covered + score) - sqrt(covered), without the cancellation of that difference."""
    return score / (math.sqrt(covered + score) + math.sqrt(covered)) if score > 0 else 0.0


def _work_dtype(*tensors: Tensor) -> torch.dtype:
    work = torch.float32
    for tensor in tensors:
        work = torch.promote_types(work, tensor.dtype)
    return work

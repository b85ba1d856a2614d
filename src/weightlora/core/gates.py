"""The gate step of WeightLoRA (StoIHT), how many gates may be open during the warm-up, and gates of whole blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightlora.core.projection import Rule, top_k

Shape = Literal["constant", "cubic", "halving"]


def gate_step(omega: Tensor, grad: Tensor, lr: float, k: int | None, rule: Rule = "signed") -> Tensor:
    r"""One step of stochastic iterative hard thresholding on the gates.

    `omega' = P_k(omega - lr * grad)` with `P_k` of :func:`~weightlora.core.projection.top_k`. With `k=None` there is
    no sparsity constraint: a plain SGD step, clamped at 0 under "positive" (the paper's indicator omega_i > 0).

    If the step `lr * grad` is exactly zero everywhere (the first step, as B = 0; a learning rate of 0) the gates come
    back as they were: projecting n equal gates would keep the first k for no reason. The decision is made on the
    device, so nothing here waits for an accelerator. A NaN is never projected away: it stays in the result, and
    `support` refuses it when the choice is made.

    Args:
        omega: gates of shape (n,); not changed.
        grad: dL/domega of shape (n,); taken to the dtype of omega.
        lr: learning rate of the gates, finite and >= 0.
        k: largest number of non-zero gates after the step, or None.
        rule: projection rule.

    Returns:
        A new tensor of shape (n,) with the dtype and device of omega, without a graph.

    Source: Nguyen, Needell, Woolf 2014 (StoIHT); paper section 3.3. Departures: the authors' code skips the projection
    when the norm of the gradient is below 1e-10 and reads that norm on the host; here "zero" means exactly zero.

    >>> import torch
    >>> omega = torch.ones(3)
    >>> gate_step(omega, torch.tensor([0.1, -0.2, 0.0]), lr=5.0, k=2)
    tensor([0., 2., 1.])
    >>> gate_step(omega, torch.zeros(3), lr=5.0, k=2)
    tensor([1., 1., 1.])
    """
    with torch.no_grad():
        step = lr * grad.to(omega.dtype)
        stepped = omega - step
        if k is not None:
            stepped = top_k(stepped, k, rule)
        elif rule == "positive":
            stepped = stepped.clamp(min=0)
        return torch.where(step.any(), stepped, omega)


def gradual_k(step: int, total: int, n: int, k: int, shape: Shape = "constant") -> int:
    r"""How many gates may be non-zero at a step of a warm-up of `total` steps.

    - ``"constant"``: k at every step, as published.
    - ``"cubic"``: `ceil(n + (k - n) * (1 - (1 - step/total)^3))`, in exact integers: falls fast, then gently.
    - ``"halving"``: n, n//2, n//4, ... in equal stretches, k at the end. With E halvings the j-th happens at step
      `j * total / E`, so the last one, to k, falls on `step == total`.

    Every shape gives k exactly at `step == total` and after it, and never less.

    Args:
        step: 1 for the first step.
        total: steps of the warm-up, at least 1.
        n: number of adapters.
        k: number to keep, in 1..n.
        shape: see above.

    Source: "cubic" is the pruning schedule of Zhu and Gupta 2017; "halving" is the authors' WeightLoRA+, where
    k <- k // 2 at each event and K = n / 2^events. Departure: here the last level is the k asked for.

    >>> [gradual_k(t, 4, 36, 5, "cubic") for t in (1, 2, 3, 4)]
    [19, 9, 6, 5]
    >>> [gradual_k(t, 20, 60, 15, "halving") for t in (1, 9, 10, 19, 20)]
    [60, 60, 30, 30, 15]
    """
    if shape == "constant" or step >= total:
        return k
    if shape == "cubic":
        return k - (-(n - k) * (total - step) ** 3) // total**3
    levels = []
    level = n
    while level > k:
        levels.append(level)
        level //= 2
    levels.append(k)
    return levels[step * (len(levels) - 1) // total]


def block_gates(alpha: Tensor) -> Tensor:
    r"""`L softmax(alpha)`: one gate per block, mean 1, all 1 where alpha is all equal.

    Args:
        alpha: (L,), float.

    Returns:
        (L,), same dtype, differentiable.

    Source: Flexora.

    >>> block_gates(torch.zeros(3))
    tensor([1., 1., 1.])
    """
    # Not L * softmax(alpha): L * (1 / L) is not always 1, and at equal alphas gates have to be exactly that.
    weights = torch.exp(alpha - alpha.detach().max())
    return weights / weights.mean()

"""Every score of every adapter that we know, from one warm-up with all of them, at the ground's own settings."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchlib.ground import Ground, Trained
from weightlora.core.importance import (
    credit,
    cross_energy,
    gate_points,
    integrated,
    one_shot,
    trapezoid,
)
from weightlora.core.published import alignment, condition_number, linear_cka, sensitivity

Scores = dict[str, list[float]]


def all_scores(
    ground: Ground, seed: int, rate: float, *, steps: int, batches: int, points: int = 5
) -> tuple[Scores, dict[str, float]]:
    """Scores by name, more is better, and the sums that should agree.

    Args:
        ground: model and task.
        seed: of initial values and rows; other rows than those on which sets are tried.
        rate: of the adapters, as in the trials.
        steps: of the warm-up with all adapters.
        batches: that one-shot scores look at; integrated gates look at half as many.
        points: at which integrated gates are read.
    """
    n = len(ground.names)
    scores = {"parameters": [float(layer.in_features + layer.out_features) for layer in ground.linears]}
    scores["depth"] = [float(i) for i in range(n)]
    scores |= _at_start(ground, seed, batches)
    scores |= _of_inputs(ground, seed + 1, batches)
    walk = _Walk(n)
    ground.trial(range(n), seed=seed, rate=rate, observe=walk, steps=steps, judged=False)
    scores |= walk.scores()
    trained = walk.trained
    assert trained is not None
    fresh = ground.batches(seed + 2, max(1, batches // 2))
    parts, fell = _integrated_gates(ground, trained, fresh, points)
    scores["integrated gates"] = parts
    sums = {"integrated gates, sum": sum(parts), "integrated gates, loss decrease": fell} | walk.sums()
    ground.reset()
    return scores, sums


def in_rounds(ground: Ground, seed: int, rate: float, *, steps: int, k: int) -> tuple[list[int], list[int]]:
    """Progressive pruning: warm up, keep the half of most credit, warm up again with these alone, until `k` are left.

    Every round begins from fresh values and rows. Before the first step nothing can be pruned in rounds: B = 0, so the
    gradient of an adapter does not depend on which others there are.

    Returns:
        The `k` of most credit after the first round, and the `k` that are left after the last.
    """
    alive, once = list(range(len(ground.names))), []
    while len(alive) > k:
        walk = _Walk(len(alive))
        ground.trial(alive, seed=seed, rate=rate, observe=walk, steps=steps, judged=False)
        order = sorted(range(len(alive)), key=lambda i, walk=walk: -float(walk.own[i]))  # type: ignore[misc]
        once = once or sorted(order[:k])
        alive = sorted(alive[i] for i in order[: max(k, len(alive) // 2)])
        seed += 1
    ground.reset()
    return once, alive


def _grads(trained: Trained) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in trained.flat()]


def _at_start(ground: Ground, seed: int, batches: int) -> Scores:
    """One-shot scores: gradients of B at B = 0, nothing moves but a new head."""
    ground.reset()
    ground.lowest = 0
    trained = Trained(ground, range(len(ground.names)), seed)
    n = len(trained.factors)
    total = [torch.zeros_like(B) for _, B in trained.factors]
    energy = torch.zeros(n, dtype=torch.float64)
    moment = [torch.zeros(len(A), len(A)) for A, _ in trained.factors]

    def note(index: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            h = out.detach().float().flatten(0, -2)
            moment[index] += h.T @ h / len(h) / batches

        return hook

    hooks = [layer.lora_A["default"].register_forward_hook(note(i)) for i, layer in enumerate(trained.layers)]
    ground.model.train()
    for batch in ground.batches(seed, batches):
        ground.model.zero_grad()
        ground.loss(batch).backward()
        for i, (_, B) in enumerate(trained.factors):
            total[i] += B.grad
            energy[i] += B.grad.double().square().sum()
    for hook in hooks:
        hook.remove()
    return {
        "gradient": [float(one_shot(t / batches)) for t in total],
        "squared gradients (PAGE)": energy.tolist(),
        "cross-batch gradient": [float(cross_energy(t.double(), e)) for t, e in zip(total, energy, strict=True)],
        "whitened gradient": [float(whitened_energy(t / batches, c)) for t, c in zip(total, moment, strict=True)],
    }


def _of_inputs(ground: Ground, seed: int, batches: int) -> Scores:
    """Published scores of the frozen model: of weights, of what goes through them, of their dense gradients."""
    ground.reset()
    layers = ground.linears
    n = len(layers)
    moments = [torch.zeros(layer.in_features, layer.in_features) for layer in layers]
    norms = torch.zeros(2, n, dtype=torch.float64)
    features: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def note(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, out: Tensor) -> None:
            x, y = args[0].detach().float().flatten(0, -2), out.detach().float().flatten(0, -2)
            y = y if layer.bias is None else y - layer.bias.detach()
            moments[index] += x.T @ x / len(x) / batches
            norms[:, index] += torch.stack((y.norm(dim=1).mean(), x.norm(dim=1).mean())).double() / batches

        return hook

    def seen(block: int) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            after = out[0] if isinstance(out, tuple) else out
            features[block].append((args[0].detach().float().mean(1), after.detach().float().mean(1)))

        return hook

    hooks = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    hooks += [block.register_forward_hook(seen(b)) for b, block in enumerate(ground.block_modules())]
    energies = torch.zeros(2, n, dtype=torch.float64)
    gradients = [torch.zeros(layer.weight.shape) for layer in layers]
    with _weights_learn(ground):
        for batch in ground.batches(seed, batches):
            ground.model.zero_grad()
            ground.lowest = 0
            batch.pop("key", None)
            ground.loss(batch).backward()
            for i, layer in enumerate(layers):
                gradients[i] += layer.weight.grad.float() / batches
                energies[0, i] += layer.weight.grad.double().norm()
    for hook in hooks:
        hook.remove()
    ground.model.zero_grad()
    blocks = [ground.block_of(i) for i in range(n)]
    kinds = [name.rpartition(".")[2] for name in ground.names]
    plain = [float(alignment(norms[0, i], norms[1, i], layer.weight.float())) for i, layer in enumerate(layers)]
    of_layer = [sum(float(energies[0, i]) for i in range(n) if blocks[i] == b) for b in range(max(blocks) + 1)]
    cka = {
        b: 1 - float(linear_cka(*(torch.cat(side) for side in zip(*pairs, strict=True))))
        for b, pairs in features.items()
    }
    variance = torch.stack([explained_variance(m, ground.settings.rank) for m in moments])
    threshold = variance.flatten().sort(descending=True).values[n * ground.settings.rank // 4]
    return {
        "alignment (PLoP)": [
            -sum(p for p, k in zip(plain, kinds, strict=True) if k == kind) / kinds.count(kind) for kind in kinds
        ],
        "explained variance (EVA)": [float(v[v >= threshold].sum() + 1e-3 * v.sum()) for v in variance],
        "layer gradient norm (Aletheia)": [of_layer[b] for b in blocks],
        "condition number (KappaTune)": [-float(condition_number(layer.weight.float())) for layer in layers],
        "weight times gradient (GoRA)": [
            float(sensitivity(layer.weight.float(), g)) for layer, g in zip(layers, gradients, strict=True)
        ],
        "block CKA": [cka[b] for b in blocks],
    }  # fmt: skip


@contextlib.contextmanager
def _weights_learn(ground: Ground) -> Iterator[None]:
    """The dense gradients of the layers, with nothing else trained."""
    for parameter in ground.model.parameters():
        parameter.requires_grad_(False)
    for layer in ground.linears:
        layer.weight.requires_grad_(True)
    ground.model.eval()
    try:
        yield
    finally:
        for layer in ground.linears:
            layer.weight.requires_grad_(False)
            layer.weight.grad = None


class _Walk:
    """Credit of every step of a warm-up, from the gradient before it, and from that of the next batch after it."""

    def __init__(self, n: int) -> None:
        self.own, self.next = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        self.before: tuple[list[Tensor], list[Tensor]] | None = None
        self.trained: Trained | None = None
        self.losses: list[float] = []

    def __call__(self, trained: Trained, step: int) -> None:
        grads = _grads(trained)
        if self.before is not None:
            old, at = self.before
            deltas = [p.detach() - was for p, was in zip(trained.flat(), at, strict=True)]
            self.own += self._by_adapter(old, deltas)
            self.next += self._by_adapter(grads, deltas)
        self.trained = trained
        self.before = grads, [p.detach().clone() for p in trained.flat()]

    @staticmethod
    def _by_adapter(grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
        pairs = range(0, len(grads), 2)
        return torch.stack([credit(grads[i : i + 2], deltas[i : i + 2]).double() for i in pairs])

    def scores(self) -> Scores:
        both = trapezoid(self.own, self.next)
        return {"credit": self.own.tolist(), "next-batch credit": self.next.tolist(), "trapezoid": both.tolist()}

    def sums(self) -> dict[str, float]:
        return {f"{name}, sum": sum(values) for name, values in self.scores().items()}


def _integrated_gates(
    ground: Ground, trained: Trained, batches: Sequence[dict[str, Any]], points: int
) -> tuple[list[float], float]:
    """What each adapter bought on these batches with all gates raised together, and what the loss fell by."""
    at, weights = gate_points(points)
    ground.model.eval()
    scales = [layer.scaling["default"] for layer in trained.layers]
    gradients = []
    losses = []
    for gate in (*at, 0.0, 1.0):
        for layer, scale in zip(trained.layers, scales, strict=True):
            layer.scaling["default"] = scale * gate
        ground.model.zero_grad()
        loss = 0.0
        for batch in batches:
            value = ground.loss(batch) / len(batches)
            if gate in at:
                value.backward()
            loss += float(value.detach())
        losses.append(loss)
        if gate in at:
            # The loss sees gate * B: its derivative by the gate is <dL/dB, B> / gate.
            inner = [float((B.grad.double() * B.double()).sum()) / gate for _, B in trained.factors]
            gradients.append(torch.tensor(inner, dtype=torch.float64))
    for layer, scale in zip(trained.layers, scales, strict=True):
        layer.scaling["default"] = scale
    return integrated(gradients, weights).tolist(), losses[-2] - losses[-1]


def whitened_energy(grad_B: Tensor, second_moment: Tensor, ridge: float = 1e-6) -> Tensor:
    r"""Gradient energy in units of the features' spread: `tr(G C^-1 G^T)`.

    G is dL/dB at B = 0, `C = E[h h^T]` the second moment of the features `h = A x`. The decrease that the best B buys
    where the loss is quadratic in the layer's output. It does not depend on A's scale, nor on its basis: `A -> M A`
    takes `G -> G M^T` and `C -> M C M^T`.

    Args:
        grad_B: (d_out, r).
        second_moment: C, (r, r).
        ridge: added to C's diagonal, as a share of its mean.

    Returns:
        A scalar tensor, float64.

    Source: Layer Card (arXiv 2602.04019), restricted to the adapter's features.

    >>> import torch
    >>> whitened_energy(torch.tensor([[2.0]]), torch.tensor([[4.0]]), ridge=0.0)
    tensor(1., dtype=torch.float64)
    """
    G, C = grad_B.double(), second_moment.double()
    C = C + torch.eye(len(C), dtype=C.dtype, device=C.device) * (ridge * C.diagonal().mean())
    solved: Tensor = torch.linalg.solve(C, G.T)
    return (solved * G.T).sum()


def explained_variance(second_moment: Tensor, r: int) -> Tensor:
    r"""Shares of the inputs' variance that their first r principal directions explain: `lambda_j / sum lambda`.

    Args:
        second_moment: `E[x x^T]` of a layer's inputs, (d_in, d_in), symmetric.
        r: how many directions, at most d_in.

    Returns:
        (r,), falling, float64.

    Source: EVA (arXiv 2410.07170), which hands ranks out along these shares over all layers. Departure: from the
    second moment in place of an incremental singular value decomposition, with the same result.

    >>> import torch
    >>> explained_variance(torch.diag(torch.tensor([1.0, 3.0])), 1)
    tensor([0.7500], dtype=torch.float64)
    """
    values = torch.linalg.eigvalsh(second_moment.double()).flip(0).clamp(min=0)
    shares: Tensor = values[:r] / values.sum()
    return shares

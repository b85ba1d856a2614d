"""What scores promise: no reward for noise, parts that add up to the loss, no say of how factors are written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import batch, lora, trainer, warm
from torch import Tensor
from transformers import TrainerCallback

import weightlora as wl
from benchlib.signals import whitened_energy
from weightlora.core.importance import cross_energy, gate_points, holding, one_shot
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.forms import Gates
from weightlora.methods.policy import StepView
from weightlora.methods.weightlora.worth import WORTHS, Credit, IntegratedGates, NextCredit, Trapezoid, Worth
from weightlora.training.held_out import HeldOutBatches

HANDLES = adapters(lora())
Pairs = tuple[tuple[Tensor, Tensor], ...]


def views(factors: Pairs, move: Callable[[int], None], steps: int) -> Sequence[StepView]:
    """A view of each step; `move` sets gradients and updates the factors."""
    for step in range(1, steps + 1):
        before = tuple((A.detach().clone(), B.detach().clone()) for A, B in factors)
        move(step)
        yield StepView(step=step, lr_factor=1.0, factors=factors, before=before)


def walked(worth: Worth, factors: Pairs, move: Callable[[int], None], steps: int) -> Tensor:
    for view in views(factors, move, steps):
        worth.add(view, last=view.step == steps)
    return worth.scores()


@pytest.mark.parametrize("kind", [Credit, NextCredit])
def test_noise_earns_credit_and_no_next_credit(kind: type[Worth]) -> None:
    """Adam follows gradients that are noise alone: nothing is learnt, and nothing must be bought."""
    generator = torch.Generator().manual_seed(0)
    factors = tuple((torch.zeros(4, 40, requires_grad=True), torch.zeros(40, 4, requires_grad=True)) for _ in HANDLES)
    flat = [p for pair in factors for p in pair]
    adam = torch.optim.Adam(flat, lr=1e-3)

    def move(step: int) -> None:
        for p in flat:
            p.grad = torch.randn(p.shape, generator=generator)
        adam.step()

    scores = walked(kind(HANDLES), factors, move, 40)
    mean, error = float(scores.mean()), float(scores.std()) / len(scores) ** 0.5
    if kind is Credit:
        assert mean > 20 * error  # it is paid for following noise
    else:
        assert abs(mean) < 3 * error


def real(steps: int, kind: type[Worth], lr: float) -> tuple[Tensor, float]:
    """Scores of a real run on one batch, and by how much the loss fell between the updates that count."""
    model, inputs = lora(dropout=0.0), batch()
    model.train()
    factors = tuple(parameters(model, "default").values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    heads = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    for p in heads:  # what a head buys is no adapter's
        p.requires_grad_(False)
    losses = []

    def move(step: int) -> None:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()

    return walked(kind(adapters(model)), factors, move, steps), losses[0] - losses[-1]


def test_trapezoid_adds_up_to_the_measured_decrease() -> None:
    scores, fell = real(20, Trapezoid, 3e-3)
    assert fell > 0.05
    assert float(scores.sum()) == pytest.approx(fell, rel=0.02)
    own, _ = real(20, Credit, 3e-3)
    assert abs(float(own.sum()) - fell) > 5 * abs(float(scores.sum()) - fell)


def test_integrated_gates_add_up_to_what_the_adapters_bought() -> None:
    model = warm(lora(dropout=0.0), 0.2)
    held_out = HeldOutBatches(model, [batch(seed=seed) for seed in range(3)])
    gates = Gates(model, trainable=False)

    def loss(gate: float) -> float:
        gates.set(torch.full((len(HANDLES),), gate))
        with torch.no_grad():
            return sum(float(held_out.loss(i)) for i in range(3)) / 3

    bought = loss(0.0) - loss(1.0)
    worth = IntegratedGates(adapters(model))
    view = StepView(
        step=5, lr_factor=1.0, factors=tuple(parameters(model, "default").values()), gates=gates, held_out=held_out
    )
    worth.add(view, last=False)
    assert torch.equal(worth.scores(), torch.zeros(len(HANDLES), dtype=torch.float64))
    worth.add(view, last=True)
    assert abs(bought) > 1e-3
    assert float(worth.scores().sum()) == pytest.approx(bought, rel=1e-3)
    assert torch.equal(gates.omega, torch.ones(len(HANDLES)))


def test_integrated_gates_do_not_see_how_factors_are_written() -> None:
    """A seven times larger, B seven times smaller: the same adapter, the same worth."""
    found = []
    for factor in (1.0, 7.0):
        model = warm(lora(dropout=0.0), 0.05)
        with torch.no_grad():
            for A, B in parameters(model, "default").values():
                A.mul_(factor)
                B.div_(factor)
        gates = Gates(model, trainable=False)
        worth = IntegratedGates(adapters(model))
        pairs = tuple(parameters(model, "default").values())
        held_out = HeldOutBatches(model, [batch()])
        worth.add(StepView(step=1, lr_factor=1.0, factors=pairs, gates=gates, held_out=held_out), last=True)
        found.append(worth.scores())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_whitened_energy_does_not_depend_on_the_basis() -> None:
    generator = torch.Generator().manual_seed(1)
    G, h, M = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 3), (50, 3), (3, 3)))
    moment = h.T @ h / 50
    same = whitened_energy(G @ M.T, M @ moment @ M.T, ridge=0.0)
    torch.testing.assert_close(same, whitened_energy(G, moment, ridge=0.0))
    # What the best B buys of a loss that is quadratic in the layer's output.
    best = -torch.linalg.solve(moment, G.T).T
    bought = -((G * best).sum() + (best @ moment * best).sum() / 2)
    torch.testing.assert_close(whitened_energy(G, moment, ridge=0.0) / 2, bought)


def test_cross_energy_is_what_different_batches_agree_on() -> None:
    grads = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    by_pairs = sum(float((grads[s] * grads[t]).sum()) for s in range(4) for t in range(4) if s != t)
    energy = torch.stack([one_shot(g) for g in grads]).sum()
    assert float(cross_energy(grads.sum(0), energy)) == pytest.approx(by_pairs)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gate_points_integrate_polynomials(count: int) -> None:
    points, weights = gate_points(count)
    assert sum(weights) == pytest.approx(1)
    for power in range(2 * count):
        assert sum(w * p**power for p, w in zip(points, weights, strict=True)) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
def test_the_smallest_set_that_holds_a_share(share: float) -> None:
    scores = [0.5, -1.0, 3.0, 0.25, 0.0, 2.0]
    kept = holding(scores, share)
    total = sum(s for s in scores if s > 0)
    assert sum(scores[i] for i in kept) >= share * total * (1 - 1e-9)
    least = min(scores[i] for i in kept)
    assert len(kept) == 1 or sum(scores[i] for i in kept) - least < share * total


def test_no_set_holds_a_share_of_nothing() -> None:
    with pytest.raises(ConfigError, match="no score is above zero"):
        holding([0.0, -1.0], 0.5)


@pytest.mark.parametrize("score", sorted(WORTHS))
def test_a_score_in_a_run(score: str, tmp_path: Path) -> None:
    """Every score decides in a real run, by the largest; one that looks before training moves nothing before T."""
    model = lora(dropout=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    made = trainer(tmp_path, model, steps=6, count=80)
    at_seam: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4 and not at_seam:
                at_seam.update({n: p.detach().clone() for n, p in model.named_parameters() if n in start})

    made.add_callback(Look())
    result = wl.fit(made, wl.WeightLoRA(k=2, select_after=4, score=score))  # type: ignore[arg-type]
    assert result.selection is not None
    scores = [choice.score for choice in result.selection.choices]
    assert all(s is not None for s in scores)
    best = sorted(range(len(scores)), key=lambda i: -(scores[i] or 0.0))[:2]
    assert [i for i, c in enumerate(result.selection.choices) if c.kept] == sorted(best)
    moved = any(not torch.equal(start[name], value) for name, value in at_seam.items())
    assert moved != WORTHS[score].holds


@pytest.mark.parametrize("score", sorted(WORTHS))
def test_a_score_goes_on_from_its_state(score: str) -> None:
    """Half the steps, the state through a copy, the other half: the scores of all steps at once."""
    model = warm(lora(dropout=0.0), 0.05)
    gates = Gates(model, trainable=False)
    held_out = HeldOutBatches(model, [batch()])
    factors = tuple(parameters(model, "default").values())
    generator = torch.Generator().manual_seed(3)
    seen = []
    for step in range(1, 7):
        before = tuple((A.detach().clone(), B.detach().clone()) for A, B in factors)
        for p in (p for pair in factors for p in pair):
            p.grad = torch.randn(p.shape, generator=generator)
        now = tuple((A.detach() - 0.1 * A.grad, B.detach() - 0.1 * B.grad) for A, B in factors)  # type: ignore[operator]
        pairs = tuple(tuple(p.requires_grad_() for p in pair) for pair in now)
        for pair, old in zip(pairs, factors, strict=True):
            for p, was in zip(pair, old, strict=True):
                p.grad = was.grad
        seen.append(StepView(step=step, lr_factor=1, factors=pairs, before=before, gates=gates, held_out=held_out))  # type: ignore[arg-type]
    whole, first, second = (WORTHS[score](adapters(model)) for _ in range(3))
    for view in seen:
        whole.add(view, last=view.step == 6)
    for view in seen[:3]:
        first.add(view, last=False)
    second.load_state(copy.deepcopy(first.state()))
    for view in seen[3:]:
        second.add(view, last=view.step == 6)
    torch.testing.assert_close(second.scores(), whole.scores(), rtol=0, atol=0)
    assert float(whole.scores().abs().sum()) > 0

"""Each method's own rule, computed a second time by hand from a stock training run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.builders import batches, lora
from torch import Tensor, nn

from weightlora.core.gates import gradual_k
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.forms import Gates
from weightlora.graft.selection import Selection
from weightlora.methods import (
    DeepestAdapters,
    Method,
    OneShotGradient,
    RandomAdapters,
    StepView,
    WeightLoRA,
    WeightLoRAPlus,
    method,
)
from weightlora.methods.weightlora.policy import WeightLoRAPolicy
from weightlora.methods.weightlora.worth import Credit
from weightlora.training import attach

N = 6
Factors = list[tuple[Tensor, Tensor]]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def factors(model: nn.Module) -> Factors:
    return list(parameters(model, "default").values())


def copies(pairs: Factors) -> Factors:
    return [(A.detach().clone(), B.detach().clone()) for A, B in pairs]


def run(model: nn.Module, made: Method, steps: int) -> tuple[Selection, Factors]:
    """Train with a method on PEFT's own forward; its selection, and what the first factors were in the end."""
    optimizer = adamw(model)
    model.train()
    tuner = attach(model, made, optimizer, max_steps=steps + 1, engine="stock")
    pairs = factors(model)
    for step, inputs in zip(range(steps), batches(), strict=False):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    return tuner.finish(), pairs


# random and top


def drawn(seed: int, n: int = 8, k: int = 3) -> tuple[str, ...]:
    made = RandomAdapters(k=k, seed=seed)
    return made.begin(HANDLES[:n], 10).decide([1.0] * n).selection.names


HANDLES = adapters(lora(layers=4))


def test_random_reaches_every_adapter_and_set() -> None:
    sets = [drawn(seed) for seed in range(200)]
    assert all(len(set(names)) == 3 for names in sets)
    # 200 draws of 3 from 8: an adapter is missed by all with probability (5/8)^200.
    assert set(itertools.chain(*sets)) == {a.name for a in HANDLES[:8]}
    counts = [sum(a.name in names for names in sets) for a in HANDLES[:8]]
    # Each count is binomial(200, 3/8): mean 75, standard deviation 6.8; five of those.
    assert max(abs(count - 75) for count in counts) < 35
    assert len(set(sets)) > 40  # of 56 possible


def test_random_depends_on_its_seed_alone() -> None:
    names = []
    for noise in range(3):
        torch.manual_seed(noise)
        torch.rand(noise)
        names.append(drawn(seed=4))
        before = torch.random.get_rng_state()
        drawn(seed=5)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert names[0] == names[1] == names[2]
    assert drawn(seed=4) != drawn(seed=5)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_top_is_the_last_ones(k: int) -> None:
    policy = DeepestAdapters(k=k).begin(HANDLES, 10)
    assert policy.seam == 0
    assert policy.decide([1.0] * 12).selection.names == tuple(a.name for a in HANDLES[12 - k :])


# gradient


def test_gradient_scores_against_autograd() -> None:
    batches_, k = 4, 2
    stock = lora()
    stock.train()
    head = [p for n, p in stock.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW(head, lr=1e-2, weight_decay=0.1)  # the adapters stay where they are
    sums = [torch.zeros_like(B) for _, B in factors(stock)]
    for step, inputs in zip(range(batches_), batches(), strict=False):
        torch.manual_seed(step)
        grads = torch.autograd.grad(loss := stock(**inputs).loss, [B for _, B in factors(stock)], retain_graph=True)
        sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
        for p, grad in zip(head, torch.autograd.grad(loss, head), strict=True):
            p.grad = grad
        optimizer.step()
    scores = [float((total / batches_).double().square().sum()) for total in sums]
    model = lora()
    start = copies(factors(model))
    selection, ended = run(model, OneShotGradient(k=k, batches=batches_), batches_)
    assert [c.score for c in selection.choices] == pytest.approx(scores, rel=1e-5)
    best = sorted(range(N), key=lambda i: -scores[i])[:k]
    assert [i for i, c in enumerate(selection.choices) if c.kept] == sorted(best)
    for (A, B), (A0, B0) in zip(ended, start, strict=True):
        assert torch.equal(A, A0)
        assert torch.equal(B, B0)
        assert not torch.any(B)


def test_gradient_score_is_the_scalar_product_of_the_first_step() -> None:
    """||dL/dB||^2 is |<dL/dW, s B A>| after one unit step from B = 0, per scale s of one."""
    model = lora(dropout=0.0)
    layer = model.base_model.model.get_submodule(HANDLES[0].name)
    layer.base_layer.weight.requires_grad_()
    model(**next(batches())).loss.backward()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    stepped = -B.grad
    product = (layer.base_layer.weight.grad * (layer.scaling["default"] * stepped @ A.detach())).sum()
    assert float(-product) == pytest.approx(float(B.grad.square().sum()), rel=1e-4)


# credit


def credits_by_hand(steps: int) -> list[float]:
    model = lora()
    model.train()
    optimizer = adamw(model)
    totals = [0.0] * N
    for step, inputs in zip(range(steps), batches(), strict=False):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        before = copies(factors(model))
        grads = [(A.grad.clone(), B.grad.clone()) for A, B in factors(model)]  # type: ignore[union-attr]
        optimizer.step()
        for i, pair in enumerate(factors(model)):
            for now, old, grad in zip(pair, before[i], grads[i], strict=True):
                moved = (now.detach() - old).double()
                totals[i] -= math.fsum((grad.double() * moved).flatten().tolist())
        optimizer.zero_grad()
    return totals


def test_credit_against_explicit_sums() -> None:
    want = credits_by_hand(5)
    selection, _ = run(lora(), WeightLoRA(k=2, select_after=5), 5)
    assert [c.score for c in selection.choices] == pytest.approx(want, rel=1e-5, abs=1e-9)
    best = sorted(range(N), key=lambda i: -want[i])[:2]
    assert [i for i, c in enumerate(selection.choices) if c.kept] == sorted(best)
    assert {c.omega for c in selection.choices} == {1.0}


def test_coverage_spreads_the_same_credits() -> None:
    want = credits_by_hand(5)
    selection, _ = run(lora(), WeightLoRA(k=3, select_after=5, coverage=True), 5)
    assert [c.score for c in selection.choices] == pytest.approx(want, rel=1e-5, abs=1e-9)

    def value(kept: tuple[int, ...]) -> float:
        return sum(math.sqrt(sum(max(want[i], 0) for i in kept if i // 3 == block)) for block in range(2))

    best = max(itertools.combinations(range(N), 3), key=value)
    assert tuple(i for i, c in enumerate(selection.choices) if c.kept) == best


def test_credit_asks_for_no_gates() -> None:
    policy = WeightLoRA(k=2, select_after=3).begin(HANDLES, 10)
    assert policy.setup.gates == "none"


# omega: the paper's gates


def gate_gradients_of_step_two() -> list[float]:
    """From a stock run, where every gate is 1: d loss / d omega_i = s <dL/dW_i, B_i A_i>."""
    model = lora(dropout=0.0)
    optimizer = adamw(model)
    stream = batches()
    model(**next(stream)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    layers = [model.base_model.model.get_submodule(a.name) for a in adapters(model)]
    for layer in layers:
        layer.base_layer.weight.requires_grad_()
    model(**next(stream)).loss.backward()
    deltas = [layer.get_delta_weight("default").detach().double() for layer in layers]
    return [float((x.base_layer.weight.grad.double() * d).sum()) for x, d in zip(layers, deltas, strict=True)]


def paper(**settings: object) -> WeightLoRA:
    made: WeightLoRA = WeightLoRA.from_preset("paper", **{"k": 2, "select_after": 8, **settings})
    return made


def omegas_over(made: WeightLoRA, steps: int, path: Any = "auto") -> tuple[list[list[float]], list[Factors]]:
    model = lora(dropout=0.0)
    optimizer = adamw(model)
    tuner = attach(model, made, optimizer, max_steps=100, engine=path)
    pairs = factors(model)
    omegas, history = [], []
    for _, inputs in zip(range(steps), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        omegas.append(list(tuner.omegas.values()))
        history.append(copies(pairs))
    return omegas, history


def test_step_one_projects_nothing() -> None:
    omegas, _ = omegas_over(paper(), 1)
    assert omegas[0] == [1.0] * N
    assert len(set(omegas_over(paper(), 2)[0][1])) > 1


@pytest.mark.parametrize("path", ["autograd", "reference"])
def test_the_first_selection_is_the_most_negative_gradients_of_step_two(path: str) -> None:
    omegas, _ = omegas_over(paper(), 2, path)
    grads = gate_gradients_of_step_two()
    chosen = sorted(range(N), key=lambda i: grads[i])[:2]
    assert [i for i, omega in enumerate(omegas[1]) if omega != 0] == sorted(chosen)
    for i in chosen:
        assert omegas[1][i] == pytest.approx(1 - 5.0 * grads[i], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cubic", "halving"])
def test_at_most_k_gates_are_open(schedule: str) -> None:
    omegas, _ = omegas_over(paper(k_schedule=schedule, select_after=8), 7)
    open_gates = [sum(omega != 0 for omega in now) for now in omegas]
    assert open_gates[0] == N  # no gradient, no projection
    limits = [gradual_k(step, 8, N, 2, schedule) for step in range(2, 8)]  # type: ignore[arg-type]
    assert all(count <= limit for count, limit in zip(open_gates[1:], limits, strict=True))
    assert open_gates[1] == limits[0]


def test_projection_waits_for_its_step() -> None:
    omegas, _ = omegas_over(paper(project_every=3, rule="signed"), 4)
    assert [sum(omega != 0 for omega in now) for now in omegas] == [6, 6, 2, 6]


def test_projection_only_at_t() -> None:
    omegas, _ = omegas_over(paper(project_every=None, rule="signed", select_after=5), 4)
    assert all(sum(omega != 0 for omega in now) == N for now in omegas)


def moved(now: Factors, before: Factors) -> list[bool]:
    return [
        not (torch.equal(A, A0) and torch.equal(B, B0)) for (A, B), (A0, B0) in zip(now, before, strict=True)
    ]  # fmt: skip


def test_what_is_gated_off_stands_still() -> None:
    omegas, history = omegas_over(paper(), 7)
    still = 0
    for step in range(2, 7):
        # A gate that was closed after the last step held its adapter through this one.
        expected = [omega != 0 for omega in omegas[step - 1]]
        assert moved(history[step], history[step - 1]) == expected
        still += expected.count(False)
    assert still >= 5 * (N - 2)


def test_drift_lets_momentum_and_decay_move_it() -> None:
    omegas, history = omegas_over(paper(drift=True), 4)
    assert [omega == 0 for omega in omegas[1]].count(True) == N - 2
    assert moved(history[2], history[1]) == [True] * N


def view(gates: Gates, step: int, lr_factor: float = 1.0) -> StepView:
    return StepView(step=step, lr_factor=lr_factor, factors=(), gates=gates)


def moved_gates(made: WeightLoRA, start: Sequence[float], grad: Sequence[float], lr_factor: float = 1.0) -> Tensor:
    gates = Gates(lora())
    gates.set(torch.tensor(start))
    gates.omega.grad = torch.tensor(grad)
    made.begin(gates.adapters, 20).observe(view(gates, 3, lr_factor))
    return gates.omega.detach()


def test_gate_steps_by_hand() -> None:
    start, grad = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0.1, -0.1, 0.3, -0.5, 0.2, 0.0]
    # 1 - 5 g: 0.5, 1.5, -0.5, 2.5, -1.0, 1.0
    assert moved_gates(paper(k=3), start, grad).tolist() == [0, 1.5, 0, 2.5, 0, 1.0]
    assert moved_gates(paper(k=5), start, grad).tolist() == [0.5, 1.5, 0, 2.5, 0, 1.0]
    assert moved_gates(paper(k=5, rule="signed"), start, grad).tolist() == [0.5, 1.5, -0.5, 2.5, 0, 1.0]
    assert moved_gates(paper(k=2, rule="magnitude"), start, grad).tolist() == [0, 1.5, 0, 2.5, 0, 0]
    slow = WeightLoRA.from_preset("official", k=3)
    assert moved_gates(slow, start, grad, lr_factor=0.5).tolist() == pytest.approx([0, 1.25, 0, 1.25, 0, 1.0])


def test_nothing_left_to_keep_is_said_plainly() -> None:
    policy = paper().begin(HANDLES, 20)
    with pytest.raises(ValueError, match=r"all 12 gates are zero at the end of warm-up; lower gate_lr \(5.0\)"):
        policy.decide([0.0] * 12)


def test_the_selection_by_omega() -> None:
    policy = paper(k=3).begin(HANDLES[:N], 20)
    selection = policy.decide([0.5, 0.0, 2.0, 0.0, 1.0, -3.0]).selection
    assert [c.kept for c in selection.choices] == [True, False, True, False, True, False]
    assert [c.omega for c in selection.choices] == [0.5, 0.0, 2.0, 0.0, 1.0, -3.0]
    assert {c.score for c in selection.choices} == {None}


@pytest.mark.parametrize("coverage", [False, True])
def test_a_closed_gate_is_no_candidate_for_any_score(coverage: bool) -> None:
    policy = paper(k=3, score="credit", coverage=coverage).begin(HANDLES[:N], 20)
    assert isinstance(policy.worth, Credit)
    policy.worth.credits = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert policy.decide([0.0, 1.0, 0.0, 2.0, 0.5, 0.1]).selection.names == tuple(HANDLES[i].name for i in (1, 3, 4))
    assert policy.decide([0.0, 0.0, 0.0, 2.0, 0.0, 0.1]).selection.names == tuple(HANDLES[i].name for i in (3, 5))


def test_credit_decides_where_gates_learn_without_projections() -> None:
    made = WeightLoRA(k=2, select_after=5, gate_lr=0.5)
    selection, _ = run(lora(), made, 5)
    assert all(choice.omega not in (0.0, 1.0) for choice in selection.choices)
    best = sorted(range(N), key=lambda i: -selection.choices[i].score)[:2]  # type: ignore[operator]
    assert [i for i, c in enumerate(selection.choices) if c.kept] == sorted(best)


def test_policy_state_holds_what_a_resume_needs() -> None:
    made = paper(score="credit")
    policy = made.begin(HANDLES[:N], 20)
    assert isinstance(policy.worth, Credit)
    policy.worth.credits = torch.arange(6.0, dtype=torch.float64)
    policy.held = [1, 4]
    other: WeightLoRAPolicy = made.begin(HANDLES[:N], 20)
    other.load_state(policy.state())
    assert list(other.held) == [1, 4]
    assert isinstance(other.worth, Credit)
    assert torch.equal(other.worth.credits, policy.worth.credits)


# initial values and growth


def test_official_initial_scale() -> None:
    model, plain = lora("llama", width=64), lora("llama", width=64)
    optimizer = adamw(model)
    attach(model, WeightLoRA.from_preset("official", k=2), optimizer, max_steps=5)
    for (A, B), (A0, _) in zip(factors(model), factors(plain), strict=True):
        assert torch.allclose(A, A0 * (64 / 4) ** 0.5)
        # kaiming_uniform with a = sqrt(5) and fan-in r: U(-1/sqrt(r), 1/sqrt(r)).
        assert 0.9 / 4**0.5 < float(A.detach().abs().max()) <= 1 / 4**0.5
        assert not torch.any(B)


@pytest.mark.parametrize("remainder", ["drop", "top"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_growth_spends_the_old_budget(k: int, remainder: str) -> None:
    model = lora("llama", width=64)
    before = adapters(model)
    budget = sum(a.rank * (a.d_in + a.d_out) for a in before)
    run(model, WeightLoRAPlus(k=k, select_after=3, remainder=remainder), 4)  # type: ignore[arg-type]
    live = adapters(model)
    spent = sum(a.rank * (a.d_in + a.d_out) for a in live)
    one_more = sum(a.d_in + a.d_out for a in live if a.rank < min(a.shape))
    assert len(live) == k
    assert spent <= budget
    assert spent + one_more > budget or one_more == 0
    if remainder == "drop":
        assert len({a.rank for a in live if a.rank < min(a.shape)}) <= 1
    assert all(a.scale == 2.0 for a in live)


def test_growth_leaves_the_loss_where_it_was() -> None:
    for growth in ("gaussian", "qr"):
        logits_ = []
        for cls in (WeightLoRA, WeightLoRAPlus):
            model = lora()
            extra = {"growth": growth} if cls is WeightLoRAPlus else {}
            run(model, cls(k=2, select_after=4, **extra), 4)
            model.eval()
            with torch.no_grad():
                logits_.append(model(**next(batches())).logits)
        assert float((logits_[0] - logits_[1]).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("name", "preset", "want"),
    [
        (
            "weightlora",
            "paper",
            {"score": "omega", "gate_lr": 5.0, "rule": "positive", "drift": False},
        ),
        ("weightlora", "official", {"rule": "signed", "select_after": None, "drift": True, "init_A": "official"}),
        ("weightlora", "official", {"gate_lr_scheduled": True, "project_every": 1, "gate_lr": 5.0}),
        ("weightlora+", "paper", {"growth": "qr", "orthonormal": False, "score": "omega"}),
        ("weightlora+", "official", {"k": 0.25, "k_schedule": "halving", "select_after": 20, "project_every": 10}),
        ("weightlora+", "official", {"growth": "qr", "noise": "uniform", "orthonormal": False}),
    ],
)
def test_presets_say_what_their_sources_say(name: str, preset: str, want: dict[str, object]) -> None:
    made = method(name, preset)
    assert {key: getattr(made, key) for key in want} == want
    assert made.preset == preset

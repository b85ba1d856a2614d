"""ALoRA against brute force on stock PEFT, finite differences, and its own accounting round by round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import QKV, adapter_state, batch, logits, lora, max_difference, trainer, warm
from tests.methods.test_lora_drop import everything, rough
from tests.methods.test_methods_battery import HELD_OUT, STEPS, Loop
from torch import nn
from transformers import TrainerCallback

import weightlora as wl
from weightlora.core.rounds import hand_out, one_round
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.forms import Formed, RankGates
from weightlora.methods import ALoRA, StepView
from weightlora.methods.alora import ALoRAPolicy, exact_scores, gradient_scores
from weightlora.training.held_out import HeldOutBatches

SHORT: dict[str, Any] = {"select_after": 2, "round_steps": 1, "rounds": 3, "moves": 3}


def toy(scale: float = 0.5) -> nn.Module:
    """Two modules of rank 2 in float64."""
    return warm(lora(layers=1, rank=2, targets=["query", "value"]), scale).double().train()


def still(model: nn.Module, off: tuple[int, ...] = ()) -> StepView:
    """A view on a model under rank gates in float64, some of them off."""
    count = sum(a.rank for a in adapters(model))
    gates = RankGates([a.rank for a in adapters(model)], value=1.0, trainable=False, device=torch.device("cpu"))
    gates.values = nn.Parameter(gates.values.detach().double(), requires_grad=False)
    gates.set(torch.tensor([0.0 if rank in off else 1.0 for rank in range(count)]))
    Formed(model, gates)
    return StepView(step=1, lr_factor=1.0, factors=(), gates=None, form=gates, held_out=HeldOutBatches(model, HELD_OUT))


def stock_loss(on: set[int], scale: float = 0.5) -> float:
    """The loss of stock PEFT in which the rows of A of all other ranks are zero."""
    model = toy(scale).eval()
    position = 0
    with torch.no_grad():
        for A, _ in parameters(model, "default").values():
            for row in range(A.shape[0]):
                if position not in on:
                    A[row].zero_()
                position += 1
        return float(model(**HELD_OUT[0]).loss)


@pytest.mark.parametrize("off", [(), (2,)])
def test_exact_importance_against_stock_peft(off: tuple[int, ...]) -> None:
    view = still(toy(), off)
    found, state = view.ranks.values.detach().clone(), torch.get_rng_state()
    got = exact_scores(view, 0)
    live = set(range(4)) - set(off)
    for rank in range(4):
        want = -stock_loss(live) + stock_loss(live - {rank}) - stock_loss({rank})
        assert float(got[rank]) == pytest.approx(want if rank in live else 0.0, rel=1e-10, abs=1e-12)
    assert torch.equal(view.ranks.values, found)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("off", [(), (2,)])
def test_first_order_importance_against_finite_differences(off: tuple[int, ...]) -> None:
    model = toy()
    view, eps = still(model, off), 1e-5
    assert view.held_out is not None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found, state = view.ranks.values.detach().clone(), torch.get_rng_state()
    got = gradient_scores(view, 0)
    assert torch.equal(view.ranks.values, found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not view.ranks.values.requires_grad
    assert view.ranks.values.grad is None
    assert model.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    for rank in range(4):
        slopes = []
        for point in (found, torch.zeros_like(found)):
            losses = []
            for sign in (1, -1):
                moved = point.clone()
                moved[rank] += sign * eps
                view.ranks.set(moved)
                with torch.no_grad():
                    losses.append(float(view.held_out.loss(0)))
            slopes.append((losses[0] - losses[1]) / (2 * eps))
        want = 0.0 if rank in off else -sum(slopes)
        assert float(got[rank]) == pytest.approx(want, rel=1e-6, abs=1e-9)
    view.ranks.set(found)


def test_scores_agree_where_the_loss_is_linear() -> None:
    scale = 1e-5
    view = still(toy(scale))
    exact, first = exact_scores(view, 0), gradient_scores(view, 0)
    assert float(first.abs().max()) > 1e-7
    torch.testing.assert_close(exact + stock_loss(set(), scale), first, rtol=1e-3, atol=1e-9)


def test_a_rank_without_output_costs_nothing() -> None:
    model = toy()
    with torch.no_grad():
        parameters(model, "default")[adapters(model)[0].name][1][:, 1] = 0.0
    score = exact_scores(still(model), 0)[1]
    assert float(score) == pytest.approx(-stock_loss(set()), rel=1e-12)  # S(M) - S(M) + S(nothing)
    model = toy()
    with torch.no_grad():
        parameters(model, "default")[adapters(model)[0].name][1][:, 1] = 0.0
    assert float(gradient_scores(still(model), 0)[1]) == 0.0


@given(st.data())
def test_hand_out(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n))
    free = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    count = data.draw(st.integers(0, 12))
    given_ = hand_out(count, scores, free)
    assert sum(given_) == min(count, sum(free))
    assert all(g <= f for g, f in zip(given_, free, strict=True))
    for i in range(n):
        for j in range(n):
            if given_[i] < free[i]:  # nobody with room is served worse than by one, and by one only by a higher score
                assert given_[j] <= given_[i] + 1
                if given_[j] == given_[i] + 1:
                    assert (-scores[j], j) < (-scores[i], i)


@given(st.data())
def test_a_round_against_its_rules(data: st.DataObject) -> None:
    n, most = data.draw(st.integers(1, 5)), 4
    live = [sorted(data.draw(st.sets(st.integers(0, most - 1)))) for _ in range(n)]
    scores = [[float(data.draw(st.integers(-3, 3))) for _ in ranks] for ranks in live]
    moves = data.draw(st.integers(0, 6))
    gone, came = one_round(live, scores, moves, [most] * n)
    every = sorted(score for part in scores for score in part)
    lost = sorted(part[ranks.index(r)] for ranks, part, out in zip(live, scores, gone, strict=True) for r in out)
    assert lost == every[:moves]  # exactly so many, and the lowest
    room = sum(most - len(ranks) for ranks, out in zip(live, gone, strict=True) if ranks and not out)
    assert sum(map(len, came)) == min(moves, room)
    for ranks, out, new in zip(live, gone, came, strict=True):
        assert not (out and new)  # receivers are disjoint from losers
        assert set(out) <= set(ranks)
        assert not set(new) & set(ranks)
        assert ranks or not new


def test_the_papers_example() -> None:
    scores = [[0.9] * 8, [0.8] * 8, [0.7] * 8, [0.1] * 8]
    assert [len(new) for new in one_round([list(range(8))] * 4, scores, 8, [16] * 4)[1]] == [3, 3, 2, 0]
    assert hand_out(8, [0.3, 0.2, 0.1], [8, 8, 8]) == [3, 3, 2]


@pytest.mark.parametrize("scoring", ["exact", "gradient"])
@pytest.mark.parametrize("moves", [1, 3])
def test_every_round(scoring: str, moves: int) -> None:
    """Exactly n_A go; who lost receives nothing; the output changes by what went and by nothing that came."""
    loop = Loop.start(ALoRA(**{**SHORT, "moves": moves, "scoring": scoring}))
    policy = loop.tuner._driver.policy
    assert isinstance(policy, ALoRAPolicy)
    budget, seen = 6 * 4, []
    move = policy._move

    def checked(factors: Any, scores: torch.Tensor) -> Any:
        before = policy.gates.values.detach().clone()
        fresh = move(factors, scores)
        after = policy.gates.values.detach().clone()
        owner = policy.gates.owner
        went, came = (before == 1) & (after == 0), (before == 0) & (after == 1)
        assert int(went.sum()) == moves
        assert float(scores[went].max()) <= float(scores[(before == 1) & ~went].min())
        assert not set(owner[went].tolist()) & set(owner[came].tolist())
        assert int(came.sum()) in (0, moves)
        assert int(after.sum()) <= budget
        assert policy.gates.values.grad is None
        answer = logits(loop.model, batch())
        policy.gates.set(torch.where(came, 0.0, after))
        assert torch.equal(logits(loop.model, batch()), answer)  # growth preserves the function
        policy.gates.set(after)
        assert all(each.ranks for each in fresh)
        seen.append(after)
        return fresh

    policy._move = checked  # type: ignore[method-assign]  # looks, and goes on
    loop.run(4)
    assert len(seen) == 3
    live = adapters(loop.model)
    assert sum(a.rank for a in live) == int(seen[-1].sum())
    assert policy.setup.count(live) == sum(a.rank * sum(a.shape) for a in live)
    assert sum(p.numel() for n, p in loop.model.named_parameters() if "lora_" in n) == policy.setup.count(live)
    assert len({a.scale for a in live}) == 1


def test_new_rows_have_loras_size_and_no_history() -> None:
    loop = Loop.start(ALoRA(**{**SHORT, "moves": 1}))
    policy = loop.tuner._driver.policy
    assert isinstance(policy, ALoRAPolicy)
    start = policy.gates.values.detach().clone()
    loop.run(2)
    came = torch.nonzero((start == 0) & (policy.gates.values == 1)).flatten().tolist()
    went = torch.nonzero((start == 1) & (policy.gates.values == 0)).flatten().tolist()
    assert len(came) == len(went) == 1
    for flat, new in ((came[0], True), (went[0], False)):
        index = int(policy.gates.owner[flat])
        rank = flat - policy.gates.bounds[index]
        A, B = loop.tuner._driver._factors[index]
        assert float(loop.optimizer.state[A]["exp_avg"][rank].abs().max()) == 0.0
        assert float(loop.optimizer.state[B]["exp_avg"][:, rank].abs().max()) == 0.0
        if new:
            assert 0.05 < float(A[rank].detach().std()) < 0.35  # 1 / sqrt(3 * 16) = 0.14
            assert float(B[:, rank].detach().abs().max()) == 0.0


def test_before_the_first_round_it_is_lora() -> None:
    one = Loop.start(ALoRA(**{**SHORT, "max_rank": 4})).run(1)
    other = Loop.start(wl.LoRA()).run(1)
    assert max_difference(adapter_state(one.model), adapter_state(other.model)) == 0.0


def test_a_module_that_lost_everything_is_gone() -> None:
    """Ranks of one module score lowest in every round."""
    loop = Loop.start(ALoRA(**{**SHORT, "rounds": 2, "moves": 2}))
    policy = loop.tuner._driver.policy
    assert isinstance(policy, ALoRAPolicy)
    move = policy._move

    def biased(factors: Any, scores: torch.Tensor) -> Any:
        return move(factors, torch.where(policy.gates.owner == 4, -1e9, scores))

    policy._move = biased  # type: ignore[method-assign]  # a hand on the scale
    name = adapters(loop.model)[4].name
    loop.run(3)
    selection = loop.tuner.selection
    assert selection is not None
    assert [c.kept for c in selection.choices] == [True] * 4 + [False, True]
    assert not any(name in n and "lora" in n for n, _ in loop.model.named_parameters())
    assert sum(a.rank for a in adapters(loop.model)) == 24
    loop.run(STEPS)
    assert loop.tuner.finish().k == 5


def test_bf16_and_accumulation_through_the_rounds() -> None:
    model, optimizer, tuner = rough(ALoRA(**SHORT))
    assert tuner.finish().k >= 5
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert len(everything(optimizer)) == len(set(everything(optimizer)))


class Rows(TrainerCallback):
    """Notes how many rows a trainer trains on."""

    def __init__(self, trainer: Any, seen: list[int]) -> None:
        self.trainer, self.seen = trainer, seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(len(self.trainer.train_dataset))


@pytest.mark.parametrize("scoring", ["exact", "gradient"])
def test_fit_and_export(scoring: Any, tmp_path: Path) -> None:
    each = trainer(tmp_path / "run", lora(targets=[*QKV["bert"], "intermediate.dense"]), steps=8, count=40)
    rows = each.train_dataset
    trained_on: list[int] = []
    each.add_callback(Rows(each, trained_on))
    result = wl.fit(each, ALoRA(**{**SHORT, "scoring": scoring}))
    assert result.selection is not None
    assert len({c.rank for c in result.selection.kept}) > 1
    assert set(trained_on) == {32}  # a batch is held out, to judge rounds by
    assert each.train_dataset is rows
    assert wl.export(result, tmp_path / "out").max_difference <= 1e-5


def test_by_default_no_more_moves_than_the_rounds_can_take() -> None:
    found = adapters(lora(rank=1))
    policy = ALoRA(select_after=1, round_steps=1, rounds=4).begin(found, 20)
    assert policy.moves == (len(found) - 1) // 4 < len({a.kind for a in found})


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"scoring": "luck"}, ConfigError, "scoring='luck' is unknown; use one of exact, gradient"),
        ({"rounds": 0}, ConfigError, "rounds=0 is not allowed"),
        ({"moves": 0}, ConfigError, "moves=0 is not allowed"),
        ({"rounds": 8}, ScheduleError, "the last of 8 rounds would be at step 9 of 9; lower rounds"),
        ({"moves": 8}, ScheduleError, "3 rounds of 8 ranks could take all 24 away; lower rounds or moves"),
    ],
)
def test_what_cannot_run(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Loop.start(ALoRA(**{**SHORT, **settings}))

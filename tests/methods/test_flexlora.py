"""FlexLoRA against dense averages, dense SVDs, and runs of single clients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import adapter_state, batches, long, lora, max_difference
from torch import Tensor, nn

from weightlora.core.merging import svd_merge
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import parameters
from weightlora.methods.flexlora import FlexLoRA
from weightlora.training import Tuner, attach

STEPS, N, R = 9, 6, 4
Pair = tuple[Tensor, Tensor]


def pair(rank: int, seed: int, d_in: int = 7, d_out: int = 5) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank))]
    return draw[0], draw[1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_core_svd_is_the_dense_svd(ranks: list[int], rank: int, seed: int) -> None:
    pairs = [pair(r, seed + i) for i, r in enumerate(ranks)]
    weights = [(i + 1) / sum(range(1, len(ranks) + 1)) for i in range(len(ranks))]
    A, B = svd_merge(pairs, weights, rank)
    dense = sum(w * b @ a for w, (a, b) in zip(weights, pairs, strict=True))
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert A.shape == (rank, 7)
    assert B.shape == (5, rank)
    # Equal singular values leave the best approximation open; what is lost is not.
    assert float(torch.linalg.norm(dense - B @ A)) == pytest.approx(float(torch.linalg.norm(dense - best)), abs=1e-9)


def test_equal_clients_give_the_same_update_back() -> None:
    a, b = pair(3, 0)
    A, B = svd_merge([(a, b)] * 3, [0.2, 0.3, 0.5], 3)
    assert torch.allclose(B @ A, b @ a, atol=1e-12)
    assert torch.allclose(A @ A.T, torch.eye(3, dtype=torch.float64), atol=1e-12)


def start(made: FlexLoRA, model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Tuner]:
    model = lora() if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    return model, optimizer, attach(model, made, optimizer, max_steps=STEPS)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, tuner: Tuner, first: int, last: int) -> None:
    stream = batches()
    for step in range(1, last + 1):
        inputs = next(stream)
        if step <= first:
            continue
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()


def test_one_client_of_the_models_rank_is_lora_refactored() -> None:
    model, optimizer, tuner = start(FlexLoRA(clients=1, rounds=3))
    before: dict[int, Any] = {}
    for step in range(1, STEPS + 1):
        stream = batches()
        inputs = [next(stream) for _ in range(step)][-1]
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        deltas = [(B @ A).detach().clone() for A, B in parameters(model, "default").values()]
        tuner.step()
        optimizer.zero_grad()
        now = [(B @ A).detach() for A, B in parameters(model, "default").values()]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(deltas, now, strict=True))
        before[step] = [optimizer.state.get(A) for A, _ in parameters(model, "default").values()]
    assert [not any(before[step]) for step in range(1, STEPS + 1)] == [step in (3, 6, 9) for step in range(1, 10)]


def test_the_server_averages_what_the_clients_came_to() -> None:
    made = FlexLoRA(clients=3, rounds=1, ranks=(2, 4, 3))
    model, optimizer, tuner = start(made)
    results, widths = [], []
    stream = batches()
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        model(**next(stream)).loss.backward()
        optimizer.step()
        if step in (3, 6, 9):
            rank = made.ranks[step // 3 - 1]  # type: ignore[index]
            pairs = parameters(model, "default").values()
            results.append([(B[:, :rank] @ A[:rank]).detach().double() for A, B in pairs])
            widths.append([int((B.detach().abs().sum(0) > 0).sum()) for _, B in pairs])
        tuner.step()
        optimizer.zero_grad()
    assert widths == [[2] * N, [4] * N, [3] * N]  # nobody trains beyond the client's rank
    selection = tuner.finish()
    for i, (A, B) in enumerate(parameters(model, "default").values()):
        mean = sum(client[i] for client in results) / 3
        U, S, Vh = torch.linalg.svd(mean)
        best = U[:, :4] * S[:4] @ Vh[:4]
        assert torch.allclose((B @ A).detach().double(), best, atol=1e-6)
    assert {choice.rank for choice in selection.kept} == {4}


@pytest.mark.parametrize("cut", [2, 5, *long(3, 7)])
@pytest.mark.parametrize("ranks", [None, (2, 6)])
def test_a_resumed_run_is_the_same_run(ranks: Any, cut: int) -> None:
    made = FlexLoRA(clients=2, rounds=2, ranks=ranks)
    whole = start(made)
    advance(*whole, 0, STEPS)
    first = start(made)
    advance(*first, 0, cut)
    state, moments, progress = first[0].state_dict(), first[1].state_dict(), first[2].state_dict()
    second = start(made, lora(seed=0))
    second[0].load_state_dict(state)
    second[1].load_state_dict(moments)
    second[2].load_state_dict(progress)
    advance(*second, cut, STEPS)
    assert second[2].finish() == whole[2].finish()
    assert max_difference(adapter_state(second[0]), adapter_state(whole[0])) == 0.0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"clients": 0}, "clients=0 is not allowed"), ({"ranks": (1, 2)}, r"ranks=\[1, 2\] must be 4 numbers")],
)
def test_settings_are_checked(settings_: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlexLoRA(**settings_)


def test_a_run_too_short_is_refused() -> None:
    with pytest.raises(ScheduleError, match="4 rounds of 4 clients need 16 optimizer steps or more, and the run has 9"):
        start(FlexLoRA())

"""IncreLoRA: growth by the budget, the score against dense autograd, and through the seam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import base, batch, batches, logits, lora
from torch import nn

import weightlora as wl
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters, lora_layers
from weightlora.graft.export import export
from weightlora.methods.increlora import RESERVE, IncreLoRAPolicy
from weightlora.training import Tuner, attach

N, M, TARGET = 6, 16, 24
SHORT: dict[str, Any] = {"init_warmup": 3, "incre_interval": 3, "top_h": 4}  # 6 -> 14 -> 22 -> 24 at 6, 9, 12


def start(model: nn.Module, made: Any) -> tuple[torch.optim.Optimizer, Tuner]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    return optimizer, attach(model, made, optimizer, max_steps=M)


def form(tuner: Tuner) -> Any:
    assert tuner._driver.formed is not None
    return tuner._driver.formed.form


def test_starts_with_one_live_rank_and_a_reserve_that_is_next_to_nothing() -> None:
    model = lora()
    _, tuner = start(model, wl.IncreLoRA(**SHORT))
    gates = form(tuner)
    E = gates.values.detach().view(N, -1)
    assert gates.open.view(N, -1).sum(1).tolist() == [1] * N
    assert E.shape[1] == 7  # 1 + 3 rounds of 2
    assert torch.equal(E, torch.tensor([0.0, RESERVE, RESERVE, 0.0, 0.0, 0.0, 0.0]).expand(N, 7))
    torch.testing.assert_close(logits(model, batch()), logits(base("bert"), batch()), atol=1e-5, rtol=1e-5)
    A, B = tuner._driver._factors[0]
    dense = 2.0 * B @ torch.diag(gates.of(0)) @ A
    assert 0 < float(dense.detach().abs().max()) < 100 * 8.0 * 1e-5 * 0.02**2


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_grows_to_the_target_and_ends_as_plain_lora(preset: str, tmp_path: Path) -> None:
    model = lora(dropout=0.0)
    optimizer, tuner = start(model, wl.IncreLoRA.from_preset(preset, **SHORT))
    policy: Any = tuner._driver.policy
    stream, ranks = batches(), [1] * N
    for step in range(1, M + 1):
        for _ in range(2):
            (model(**next(stream)).loss / 2).backward()
        optimizer.step()
        moments = None
        if tuner.selection is None:
            gates = form(tuner)
            moments = [optimizer.state[A]["exp_avg"].clone() for A, _ in tuner._driver._factors]
        tuner.step()
        optimizer.zero_grad()
        if tuner.selection is not None:
            assert preset == "recommended"
            continue
        now, scores = list(policy.pool.ranks), policy.stats[0] * policy.stats[1]
        total = min(TARGET, N + 8 * len([t for t in (6, 9, 12) if t <= step]))
        assert sum(now) == total == int(gates.open.sum()), step
        if step in (6, 9, 12):
            grown = [i for i in range(N) if now[i] > ranks[i]]
            best = scores.sort(descending=True).indices.tolist()
            assert grown == sorted(best[: 1 if step == 12 else 4])
            for i, (A, _) in enumerate(tuner._driver._factors):
                used = ranks[i] + 2  # what was live or in reserve keeps its memory
                assert moments is not None
                assert torch.equal(optimizer.state[A]["exp_avg"][:used], moments[i][:used])
        assert (tuner._driver.watch is not None) == (sum(now) < TARGET)  # no hooks after the target
        if step > 12:
            assert torch.equal(gates.values == 0, ~gates.open)  # no reserve contributes any more
        ranks = now
    last = logits(model, batch())
    selection = tuner.finish()
    torch.testing.assert_close(logits(model, batch()), last, atol=1e-5, rtol=1e-5)
    assert selection.step == (12 if preset == "recommended" else None)
    live = adapters(model)
    assert sum(a.rank for a in live) == TARGET
    assert {a.scale for a in live} == {2.0}
    assert policy.setup.count(live) == sum(a.rank * (a.d_in + a.d_out + (preset == "paper")) for a in live)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any("rank_gates" in name for name, _ in model.named_parameters())
    assert export(model, tmp_path / "out", sample=batch()).max_difference <= 1e-5
    model(**batch()).loss.backward()
    optimizer.step()


def test_growth_is_the_rescale_and_the_reserve_and_nothing_else() -> None:
    """In float64: every dW shrinks by ranknum_old / ranknum_new; what else changes is what goes out of the reserve and
    what comes into it, ``s r / ranknum * 1e-5 b_j a_j``, term by term."""
    model = lora(dropout=0.0)
    optimizer, tuner = start(model, wl.IncreLoRA(**SHORT, shrink=False))
    model.double()
    optimizer.param_groups[0]["weight_decay"] = 0.0  # it would move the reserve's E, which each step then puts back
    policy, gates, stream = tuner._driver.policy, form(tuner), batches()
    assert isinstance(policy, IncreLoRAPolicy)
    gates.factor = gates.factor.double()
    policy.pool.arrange(gates)  # again, unrounded

    def parts() -> list[torch.Tensor]:
        """``(most, d_out, d_in)`` of each adapter: what every rank adds to dW."""
        pairs = enumerate(tuner._driver._factors)
        return [torch.einsum("oi,id->iod", 2.0 * B * gates.of(i), A).detach() for i, (A, B) in pairs]

    sizes = []
    for step in range(1, M + 1):
        model(**next(stream)).loss.backward()
        optimizer.step()
        before, ranks, used = parts(), list(policy.pool.ranks), policy.pool.used()
        tuner.step()
        optimizer.zero_grad()
        if step not in (6, 9, 12):
            continue
        now, left = list(policy.pool.ranks), policy.pool.used()
        for i, (old, new) in enumerate(zip(before, parts(), strict=True)):
            ratio = (ranks[i] + 1e-5) / (now[i] + 1e-5)
            stays, last = min(used[i], left[i]), max(used[i], left[i])
            torch.testing.assert_close(new[:stays], ratio * old[:stays], rtol=0, atol=1e-12)
            assert not new[left[i] :].any()
            assert not old[used[i] :].any()
            A, B = tuner._driver._factors[i]
            came = 2.0 * 4 / (now[i] + 1e-5) * RESERVE * torch.einsum("oi,id->iod", B, A)[stays : left[i]]
            torch.testing.assert_close(new[stays : left[i]], came, rtol=0, atol=1e-12)
            jump = new.sum(0) - ratio * old.sum(0)
            torch.testing.assert_close(jump, came.sum(0) - ratio * old[stays:last].sum(0), rtol=0, atol=1e-12)
            sizes.append((float(jump.abs().max()), float((2.0 * gates.factor[i] * B @ A).detach().abs().max())))
    assert any(now > 0 for now, _ in sizes)
    # The reserve is 1e-5 of what it would be live, and that is all that is not the rescale.
    assert all(jump <= RESERVE * whole for jump, whole in sizes)


def test_score_is_that_of_the_dense_gradient() -> None:
    """``sum |dW * G| / sqrt(numel)`` with G from autograd on a dense weight."""
    model = lora(dropout=0.0)
    optimizer, tuner = start(model, wl.IncreLoRA(**SHORT))
    stream = batches()
    mean, spread = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for _ in range(4):
        weights = [layer.get_base_layer().weight for _, layer in lora_layers(model, "default")]
        for weight in weights:
            weight.requires_grad_(True)
        model(**next(stream)).loss.backward()
        wanted = []
        for i, weight in enumerate(weights):
            grad, weight.grad = weight.grad, None
            weight.requires_grad_(False)
            A, B = tuner._driver._factors[i]
            dense = 2.0 * (B * form(tuner).of(i)) @ A
            wanted.append(float((dense * grad).detach().abs().sum()) / weight.numel() ** 0.5)
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        score = torch.tensor(wanted, dtype=torch.float64)
        mean = 0.85 * mean + 0.15 * score
        spread = 0.85 * spread + 0.15 * (score - mean).abs()
    policy: Any = tuner._driver.policy
    torch.testing.assert_close(policy.stats, torch.stack([mean, spread]), rtol=1e-4, atol=1e-9)


def test_bfloat16_goes_through_the_seam() -> None:
    model = lora().to(torch.bfloat16)
    optimizer, tuner = start(model, wl.IncreLoRA(**SHORT))
    for _, inputs in zip(range(M), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    assert tuner.finish().step == 12
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model, batch())).all()


def test_a_target_of_one_rank_grows_nothing() -> None:
    model = lora(rank=1)
    optimizer, tuner = start(model, wl.IncreLoRA(**SHORT))
    for _, inputs in zip(range(M), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        assert form(tuner).values.shape == (N,)
    assert sum(c.rank for c in tuner.finish().kept) == N


def test_within_aims_at_the_budget_and_the_last_round_spends_it() -> None:
    made, rank = wl.IncreLoRA(top_h=1).within(1234, [(8, 8), (8, 24), (40, 8)], 8)
    assert (made.spend, rank) == (1234, 1234 // (16 + 32 + 48))
    assert made.top_h == 1


def test_refuses_what_cannot_run() -> None:
    with pytest.raises(ConfigError, match="incre_rank_num=0 is not allowed"):
        wl.IncreLoRA(incre_rank_num=0)
    with pytest.raises(ConfigError, match=r"beta2=1\.0 is not allowed"):
        wl.IncreLoRA(beta2=1.0)
    with pytest.raises(ConfigError, match="orth_reg_weight=-1 is not allowed"):
        wl.IncreLoRA(orth_reg_weight=-1)
    with pytest.raises(ScheduleError, match="needs 9 rounds of growth, the last at step 30 of 16"):
        start(lora(), wl.IncreLoRA(init_warmup=3, incre_interval=3, top_h=1))

"""Growing inside a model: the same function, gradients for the new directions, and no outsized step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.builders import FAMILIES, base, batch, batches, logits, lora, warm
from torch import Tensor, nn

from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.optimizer import Change, remap
from weightlora.graft.surgery import grow_adapters

MODES = ["gaussian", "qr"]
modes = pytest.mark.parametrize("mode", MODES)
OLD, NEW = 3, 7


def exact(family: str = "bert") -> PeftModel:
    return warm(lora(family, dropout=0.0, rank=OLD).double())  # type: ignore[return-value]


def grown(model: nn.Module, mode: str, rank: int = NEW, seed: int = 0) -> dict[nn.Parameter, Change]:
    ranks = {a.name: rank for a in adapters(model)}
    return grow_adapters(model, ranks, mode=mode, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    for _, inputs in zip(range(count), batches(seed=seed), strict=False):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


@modes
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_scale_and_config(family: str, mode: str, tmp_path: Path) -> None:
    model = exact(family)
    before, live = adapters(model), logits(model, batch())
    grown(model, mode)
    # Llama's norms and DeBERTa's attention compute in float32 whatever the model's dtype.
    assert float((logits(model, batch()) - live).abs().max()) < (1e-12 if family in ("bert", "bart") else 1e-6)
    after = adapters(model)
    assert [a.name for a in after] == [a.name for a in before]
    assert {a.rank for a in after} == {NEW}
    assert [a.scale for a in after] == [a.scale for a in before]
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(family, dropout=0.0).double(), tmp_path, autocast_adapter_dtype=False)
    assert adapters(stock) == after
    assert stock.peft_config["default"].rank_pattern == {}
    assert stock.peft_config["default"].alpha_pattern == {}
    for a, b in zip(parameters(stock, "default").values(), parameters(model, "default").values(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert torch.allclose(logits(stock, batch()), live, atol=1e-6)


@modes
def test_effective_rank_is_the_promised_one_once_trained(mode: str) -> None:
    model = exact()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    run(model, optimizer, 2)
    remap(optimizer, grown(model, mode))
    ranks = [int(torch.linalg.matrix_rank(B @ A)) for A, B in parameters(model, "default").values()]
    assert ranks == [OLD] * 6
    run(model, optimizer, 6, seed=1)
    ranks = [int(torch.linalg.matrix_rank(B @ A)) for A, B in parameters(model, "default").values()]
    assert ranks == [NEW] * 6


@modes
def test_new_directions_get_gradient_at_the_next_step(mode: str) -> None:
    model = exact()
    grown(model, mode)
    model(**batch()).loss.backward()
    for A, B in parameters(model, "default").values():
        assert A.grad is not None
        assert B.grad is not None
        assert float(B.grad[:, OLD:].abs().amax(0).min()) > 0
        assert float(A.grad[OLD:].abs().max()) == 0  # its partner is zero still
    torch.optim.SGD(trainable(model), lr=0.1).step()
    model.zero_grad()
    model(**batch(seed=4)).loss.backward()
    assert all(float(A.grad[OLD:].abs().amax(1).min()) > 0 for A, _ in parameters(model, "default").values())  # type: ignore[index]


def test_gaussian_keeps_adams_state_to_the_bit() -> None:
    model = exact()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, amsgrad=True)
    run(model, optimizer, 4)
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    old = [
        [{k: optimizer.state[f][k].clone() for k in keys} for f in pair]
        for pair in parameters(model, "default").values()
    ]
    remap(optimizer, grown(model, "gaussian"))
    for (A, B), (old_A, old_B) in zip(parameters(model, "default").values(), old, strict=True):
        for key in keys:
            assert torch.equal(optimizer.state[A][key][:OLD], old_A[key])
            assert torch.equal(optimizer.state[B][key][:, :OLD], old_B[key])
            order = 0.0 if key == "exp_avg" else 1.0
            assert torch.allclose(optimizer.state[A][key][OLD:], order * old_A[key].mean(0).expand(NEW - OLD, -1))
            assert torch.allclose(optimizer.state[B][key][:, OLD:], order * old_B[key].mean(1)[:, None])
        assert float(optimizer.state[A]["step"]) == 4


def test_qr_first_moments_obey_the_chain_rule() -> None:
    """Adam at learning rate 0 in the rotated model gathers what the rotation of Adam's memory must give."""
    moments = []
    for grow_first in (True, False):
        model = exact()
        changes = {} if not grow_first else grown(model, "qr")
        optimizer = torch.optim.AdamW(trainable(model), lr=0.0)
        run(model, optimizer, 4)
        if not grow_first:
            changes = grown(model, "qr")
            remap(optimizer, changes)
        assert len(changes) == 12
        moments.append(
            [(optimizer.state[A]["exp_avg"][:OLD], optimizer.state[B]["exp_avg"][:, :OLD])
             for A, B in parameters(model, "default").values()]
        )  # fmt: skip
    for rotated, carried in zip(*moments, strict=True):
        for want, got in zip(rotated, carried, strict=True):
            assert float(want.abs().max()) > 0
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-14)


def test_qr_second_moments_are_those_of_independent_entries() -> None:
    model = exact()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    run(model, optimizer, 4)
    old = [[optimizer.state[f]["exp_avg_sq"].clone() for f in pair] for pair in parameters(model, "default").values()]
    changes = grown(model, "qr")
    mixes = [change.mix for change in changes.values()]
    remap(optimizer, changes)
    for index, (A, B) in enumerate(parameters(model, "default").values()):
        R = mixes[2 * index]
        assert R is not None
        inverse = torch.linalg.inv(R)
        for i in range(OLD):
            want_A = sum(R[i, j] ** 2 * old[index][0][j] for j in range(OLD))
            want_B = sum(old[index][1][:, j] * inverse[j, i] ** 2 for j in range(OLD))
            assert torch.allclose(optimizer.state[A]["exp_avg_sq"][i], want_A)
            assert torch.allclose(optimizer.state[B]["exp_avg_sq"][:, i], want_B)


def zero_padded(optimizer: torch.optim.Optimizer, changes: dict[nn.Parameter, Change]) -> None:
    """What a naive program does: zeros for the new rows, and the old step counter."""
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            if old not in changes:
                continue
            new = changes[old].new
            assert new is not None
            state = optimizer.state.pop(old)
            for key in ("exp_avg", "exp_avg_sq"):
                padded = torch.zeros_like(new)
                padded[tuple(slice(n) for n in old.shape)] = state[key]
                state[key] = padded
            optimizer.state[new] = state
            group["params"][position] = new


def age(optimizer: torch.optim.Optimizer, taken: int, counter: int = 20_000) -> None:
    """Adam's memory as after many more steps of such gradients: bias corrections done with, counter high."""
    for state in optimizer.state.values():
        state["exp_avg"] /= 1 - 0.9**taken
        state["exp_avg_sq"] /= 1 - 0.999**taken
        state["step"].fill_(counter)


def movements(mode: str, carry: Callable[..., None], before: int, aged: bool) -> tuple[list[float], list[float]]:
    """Largest movement of a new and of an old entry in each of 20 steps after growth, in learning rates."""
    lr = 1e-3
    model = exact()
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)
    run(model, optimizer, before)
    if aged:
        age(optimizer, before)
    carry(optimizer, grown(model, mode))
    pairs = list(parameters(model, "default").values())

    def entries() -> list[Tensor]:
        new = [t for A, B in pairs for t in (A[OLD:], B[:, OLD:])]
        old = [t for A, B in pairs for t in (A[:OLD], B[:, :OLD])]
        return [torch.cat([t.detach().flatten().clone() for t in part]) for part in (new, old)]

    found: tuple[list[float], list[float]] = ([], [])
    last = entries()
    for _, inputs in zip(range(20), batches(seed=1), strict=False):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        now = entries()
        for steps, a, b in zip(found, now, last, strict=True):
            steps.append(float((a - b).abs().max()) / lr)
        last = now
    return found


@modes
def test_no_outsized_step_after_growth(mode: str) -> None:
    new, _ = movements(mode, remap, before=200, aged=False)
    naive, _ = movements(mode, zero_padded, before=200, aged=False)
    # A fresh Adam's first step is one learning rate.
    assert new[0] < 1.2
    assert max(new) < 1.5
    assert naive[0] > 1.2
    assert max(naive) > 2


@modes
def test_no_outsized_step_after_a_long_run(mode: str) -> None:
    new, old = movements(mode, remap, before=50, aged=True)
    naive, _ = movements(mode, zero_padded, before=50, aged=True)
    # A long memory lets any entry run when its gradients agree; new entries do so no more than old ones.
    assert new[0] < 1.2
    assert max(new) < 1.2 * max(old)
    # The mistake this rule is for: (1 - 0.9) / sqrt(1 - 0.999) at once, and more while the first moment fills up.
    assert naive[0] == pytest.approx(0.1 / 0.001**0.5, rel=0.02)
    assert max(naive) > 2 * max(old)


def test_only_the_named_ones_grow() -> None:
    model = exact()
    first, second, *_ = adapters(model)
    A, B = parameters(model, "default")[second.name]
    changes = grow_adapters(model, {first.name: 5, second.name: OLD}, generator=torch.Generator())
    assert len(changes) == 2
    assert [a.rank for a in adapters(model)] == [5, *[OLD] * 5]
    assert parameters(model, "default")[second.name] == (A, B)


def test_old_graphs_stay_usable() -> None:
    model = exact()
    loss = model(**batch()).loss
    grown(model, "qr")
    loss.backward()
    assert all(A.grad is None for A, _ in parameters(model, "default").values())

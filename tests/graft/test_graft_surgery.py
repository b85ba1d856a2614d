"""Disconnecting, folding and reshaping: the base layer is back, the output stays, stock PEFT can load the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import FAMILIES, QKV, adapter_state, base, batch, batches, logits, lora, max_difference, warm
from torch import Tensor, nn

from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.forms import Gates
from weightlora.graft.optimizer import Drop, remap
from weightlora.graft.surgery import disconnect, fold, grow_adapters, reshape
from weightlora.methods import LoRA

QUERY, KEY, VALUE = (f"bert.encoder.layer.0.attention.self.{kind}" for kind in ("query", "key", "value"))


def names(model: nn.Module) -> list[str]:
    return [a.name for a in adapters(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_models_own_layer_is_back(family: str) -> None:
    plain = base(family)
    own = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    weights = {n: m.weight for n, m in own.items()}
    model = warm(get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=list(QKV[family]))))
    gone = names(model)[::2]
    gates = Gates(model)
    gates.set(torch.tensor([0.0 if name in gone else 1.0 for name in names(model)]))
    off = logits(model, batch())
    gates.detach()
    factors = parameters(model, "default", gone)
    changes = disconnect(model, gone)
    for name in gone:
        here = plain.get_submodule(name)
        assert here is own[name]
        assert type(here) is nn.Linear
        assert here.weight is weights[name]
    assert not [n for n, _ in model.named_parameters() if "lora_" in n and any(f"{g}." in n for g in gone)]
    assert set(changes) == {f for pair in factors.values() for f in pair}
    assert all(isinstance(change, Drop) for change in changes.values())
    # The engine with gates adds inside addmm, stock PEFT outside: the survivors differ by rounding.
    assert torch.allclose(logits(model, batch()), off, atol=1e-6)


def test_output_is_that_of_gates_at_zero_to_the_bit() -> None:
    model = warm(lora())
    gates = Gates(model, engine_name="reference")
    gates.set(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]))
    off = logits(model, batch())
    gone = [n for n, omega in zip(names(model), gates.omega.tolist(), strict=True) if omega == 0]
    gates.detach()
    disconnect(model, gone)
    assert torch.equal(logits(model, batch()), off)


def test_the_dropped_get_no_gradient_and_the_optimizer_forgets_them() -> None:
    model = warm(lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dropped = parameters(model, "default", [KEY])[KEY]
    before = [dropped[0].clone(), dropped[1].clone()]
    remap(optimizer, disconnect(model, [KEY]))
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters() if p.requires_grad]
    assert not any(factor in optimizer.state for factor in dropped)
    model(**batch()).loss.backward()
    optimizer.step()
    assert [f.grad for f in dropped] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(dropped, before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_saved_as_stock_peft(family: str, tmp_path: Path) -> None:
    model = warm(lora(family))
    kept = names(model)[1::3]
    disconnect(model, [n for n in names(model) if n not in kept])
    assert names(model) == kept
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(family), tmp_path)
    assert names(stock) == kept
    assert torch.equal(logits(stock, batch()), logits(model, batch()))


def two_adapters() -> PeftModel:
    model = lora(task_type=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=list(QKV["bert"])))
    warm(model)
    return model


def test_a_second_adapter_on_the_layer_is_left_alone() -> None:
    model = two_adapters()
    model.set_adapter("second")
    want = logits(model, batch())
    state = {k: v for k, v in model.state_dict().items() if ".second." in k}
    model.set_adapter("default")
    layer = model.base_model.model.get_submodule(KEY)
    disconnect(model, [KEY])
    assert set(layer.lora_A) == {"second"}
    assert max_difference({k: v for k, v in model.state_dict().items() if ".second." in k}, state) == 0.0
    assert not layer.lora_A["second"].weight.requires_grad
    model.set_adapter("second")
    assert torch.equal(logits(model, batch()), want)


def test_a_second_adapter_does_not_take_over() -> None:
    model, alone = two_adapters(), warm(lora(task_type=None))
    assert torch.equal(logits(model, batch()), logits(alone, batch()))
    for each in (model, alone):
        disconnect(each, [QUERY, KEY])
    assert torch.equal(logits(model, batch()), logits(alone, batch()))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), logits(base("bert"), batch()))


def test_refuses_unknown_and_merged() -> None:
    model = warm(lora())
    with pytest.raises(AdapterError, match=r"no adapter 'default' on 'nowhere'; the adapters are on bert\."):
        disconnect(model, [KEY, "nowhere"])
    assert KEY in names(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=f"the adapter on '{KEY}' is merged into its base; call model.unmerge"):
        disconnect(model, [KEY])


OMEGAS = [0.5, 1.0, -1.5, 2.0, 0.25, 3.0]


def exact() -> PeftModel:
    return warm(lora(dropout=0.0).double())  # type: ignore[return-value]


def test_fold_changes_nothing_and_gates_are_gone() -> None:
    model = exact()
    gates = Gates(model, dtype=torch.float64)
    gates.set(torch.tensor(OMEGAS, dtype=torch.float64))
    live = logits(model, batch())
    old = {name: B.detach().clone() for name, (_, B) in parameters(model, "default").items()}
    gates.detach()
    changes = fold(model, dict(zip(names(model), OMEGAS, strict=True)))
    assert float((logits(model, batch()) - live).abs().max()) < 1e-12
    for (name, (_, B)), omega in zip(parameters(model, "default").items(), OMEGAS, strict=True):
        assert torch.equal(B, omega * old[name])
        assert (B in changes) == (omega != 1.0)


@pytest.mark.parametrize("omega", [0.0, float("nan"), float("inf")])
def test_fold_refuses_what_has_no_inverse(omega: float) -> None:
    with pytest.raises(AdapterError, match=f"omega of {KEY} is {omega}; only a non-zero finite gate can be folded"):
        fold(lora(), {KEY: omega})


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    for _, inputs in zip(range(count), batches(seed=seed), strict=False):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


def test_adams_memory_follows_a_fold() -> None:
    """With B's step in proportion to its new size, a folded run goes where the run with frozen gates goes.

    For ``B' = w B`` Adam's step on B moves B' by ``w lr m / (sqrt(v) + eps)``. The folded moments are ``m / w`` and
    ``v / w^2``, so learning rate ``|w| lr``, eps ``eps / |w|`` and decay ``decay / |w|`` give the same, for ever.
    """
    runs = []
    for folded in (False, True):
        model = exact()
        model.train()
        groups = [{"params": [p]} for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
        gates = Gates(model, trainable=False, dtype=torch.float64)
        gates.set(torch.tensor(OMEGAS, dtype=torch.float64))
        steps(model, optimizer, 6, seed=1)
        if folded:
            gates.detach()
            remap(optimizer, fold(model, dict(zip(names(model), OMEGAS, strict=True))))
            omega_of = {B: w for (_, B), w in zip(parameters(model, "default").values(), OMEGAS, strict=True)}
            for group in optimizer.param_groups:
                size = abs(omega_of.get(group["params"][0], 1.0))
                group.update(lr=group["lr"] * size, eps=group["eps"] / size, weight_decay=group["weight_decay"] / size)
        steps(model, optimizer, 6, seed=2)
        runs.append(adapter_state(model))  # with gates on, the state dict shows omega * B
    # Twelve float64 steps; nothing but rounding separates the runs.
    assert max_difference(*runs) < 1e-11


def test_a_fold_leaves_the_next_steps_size_alone() -> None:
    """In its own units a folded B steps as far as it would have; a fresh memory or an uncarried one would not."""
    moved = []
    for carried in (True, False):
        model = exact()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        gates = Gates(model, trainable=False, dtype=torch.float64)
        gates.set(torch.full((6,), 4.0, dtype=torch.float64))
        steps(model, optimizer, 6, seed=1)
        gates.detach()
        changes = fold(model, dict.fromkeys(names(model), 4.0))
        if carried:
            remap(optimizer, changes)
        before = [B.detach().clone() for _, B in parameters(model, "default").values()]
        steps(model, optimizer, 1, seed=2)
        after = [B.detach() for _, B in parameters(model, "default").values()]
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]))

    model = exact()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    gates = Gates(model, trainable=False, dtype=torch.float64)
    gates.set(torch.full((6,), 4.0, dtype=torch.float64))
    steps(model, optimizer, 6, seed=1)
    before = [gates.factors(i)[1].detach().clone() for i in range(6)]
    steps(model, optimizer, 1, seed=2)
    want = torch.cat([(gates.factors(i)[1].detach() - before[i]).flatten() for i in range(6)])
    # eps (1e-8) against root second moments that are four times smaller after the fold.
    assert float((moved[0] - want).abs().max()) < 1e-3 * 1e-2
    assert float((moved[1] - want).abs().max()) > 1e-3 * 0.1


def test_reshape_makes_room_for_a_finished_run(tmp_path: Path) -> None:
    model = warm(lora())
    disconnect(model, [n for n in names(model) if n not in (QUERY, VALUE)])
    grow_adapters(model, {VALUE: 7}, generator=torch.Generator().manual_seed(0))
    kept = adapters(model)
    fresh = lora()
    reshape(fresh, LoRA().keep_all(kept, "as they are"))
    assert adapters(fresh) == kept
    assert all(not torch.any(f) for name, pair in parameters(fresh, "default", [VALUE]).items() for f in pair)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, batch()), logits(model, batch()))
    fresh.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base("bert"), tmp_path), batch()), logits(model, batch()))


def test_reshape_refuses_another_model() -> None:
    with pytest.raises(AdapterError, match="the checkpoint keeps an adapter on 'elsewhere', which this model does not"):
        reshape(lora(), LoRA().keep_all([replace(adapters(lora())[0], name="elsewhere")], "of another model"))


def test_works_in_a_plain_sequential() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 2)))
    inner: nn.Module = net[2][0]  # type: ignore[index]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2.0"]))
    x: Tensor = torch.randn(3, 4)
    want = model(x)
    disconnect(model, ["2.0"])
    assert net[2][0] is inner  # type: ignore[index]
    assert torch.equal(model(x), want)  # B is zero still
    assert names(model) == ["0"]

"""The omega vector in a whole model: its gradient, what is saved while it is on, and leaving without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.builders import FAMILIES, adapter_state, base, batch, batches, logits, lora, max_difference, warm
from torch import Tensor, nn

from weightlora.graft.depth import checkpoint_blocks
from weightlora.graft.forms import Gates, scalar_products
from weightlora.ops import ENGINES

VALUES = [0.0, 1.0, 0.5, -1.5, 0.0, 2.0]
engines = pytest.mark.parametrize("engine", sorted(ENGINES))


def exact(family: str = "bert", dropout: float = 0.0) -> PeftModel:
    """A float64 model whose adapters do something."""
    return warm(lora(family, dropout=dropout).double())  # type: ignore[return-value]


def gated(model: nn.Module, engine: str = "autograd", values: Sequence[float] | None = None) -> Gates:
    gates = Gates(model, engine_name=engine, dtype=torch.float64)  # type: ignore[arg-type]
    if values is not None:
        gates.set(torch.tensor(values, dtype=torch.float64))
    return gates


def central_differences(model: nn.Module, gates: Gates, inputs: list[dict[str, Tensor]], step: float = 1e-6) -> Tensor:
    """d(sum of losses) / d(omega), each from two forward passes."""
    start = gates.omega.detach().clone()

    def total() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return sum(float(model(**i).loss) for i in inputs)

    slopes = torch.zeros(len(gates), dtype=torch.float64)
    for index in range(len(gates)):
        sides = []
        for sign in (1, -1):
            moved = start.clone()
            moved[index] += sign * step
            gates.set(moved)
            sides.append(total())
        slopes[index] = (sides[0] - sides[1]) / (2 * step)
    gates.set(start)
    return slopes


@pytest.mark.parametrize("values", [None, VALUES])
def test_scalar_products_are_those_of_the_dense_gradients(values: list[float] | None) -> None:
    """Without gates, and under gates of 0, of 1 and of others."""
    model = exact("bert")
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    if values is not None:
        values = (values * len(layers))[: len(layers)]
        gated(model, values=values)
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers]
    for _, inputs in zip(range(2), batches(), strict=False):
        model(**inputs).loss.backward()
    dense = [
        layer.scaling["default"]
        * (weight.grad * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)).sum()
        for layer, weight in zip(layers, weights, strict=True)
    ]
    assert scalar_products(model).tolist() == pytest.approx([product.item() for product in dense], rel=1e-9)
    assert all(abs(product.item()) > 1e-9 for product in dense)


@engines
@pytest.mark.parametrize("family", ["bert", "bart"])  # the others cast to float32 inside, which drowns differences
def test_gradient_against_finite_differences(family: str, engine: str) -> None:
    model = exact(family)
    gates = gated(model, engine)
    gates.set(torch.tensor(VALUES, dtype=torch.float64).repeat(4)[: len(gates)])
    inputs = [batch(3, seed=1)]
    model(**inputs[0]).loss.backward()
    want = central_differences(model, gates, inputs)
    assert gates.omega.grad is not None
    # Central differences of step 1e-6 in float64 are good to about 1e-9.
    assert torch.allclose(gates.omega.grad, want, atol=2e-9, rtol=1e-6)
    zero = gates.omega.detach() == 0
    assert float(gates.omega.grad[zero].abs().min()) > 1e-6  # a gate that is off still hears what it is worth


@engines
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_dense_update(family: str, engine: str) -> None:
    """d loss / d omega_i = s <d loss / d W_i, B_i A_i>, with the dense gradient from the frozen base weight itself."""
    model = exact(family)
    gates = gated(model, engine)
    gates.set(torch.tensor(VALUES, dtype=torch.float64).repeat(4)[: len(gates)])
    layers = [model.base_model.model.get_submodule(a.name) for a in gates.adapters]
    for layer in layers:
        layer.base_layer.weight.requires_grad_()
    model(**batch()).loss.backward()
    deltas = [layer.get_delta_weight("default").detach() for layer in layers]
    want = torch.stack([(x.base_layer.weight.grad * d).sum() for x, d in zip(layers, deltas, strict=True)])
    assert gates.omega.grad is not None
    assert torch.allclose(gates.omega.grad, want, rtol=1e-9, atol=1e-14)
    assert float(want.abs().min()) > 1e-7


@engines
def test_gradient_with_dropout_and_accumulation(engine: str) -> None:
    model = exact(dropout=0.2)
    model.train()
    gates = gated(model, engine, VALUES)
    inputs = [batch(3, seed=s) for s in (1, 2, 3)]
    torch.manual_seed(0)
    for part in inputs:
        model(**part).loss.backward()
    assert torch.allclose(gates.omega.grad, central_differences(model, gates, inputs), atol=5e-9, rtol=1e-6)  # type: ignore[arg-type]


@engines
def test_gradient_under_checkpointing_is_the_same(engine: str) -> None:
    grads = []
    for recompute in (False, True):
        model = exact(dropout=0.2)
        model.train()
        if recompute:
            checkpoint_blocks(model, {"use_reentrant": False})
        gates = gated(model, engine, VALUES)
        torch.manual_seed(0)
        model(**batch()).loss.backward()
        assert gates.omega.grad is not None
        factors = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append({"omega": gates.omega.grad, **factors})
    assert max_difference(*grads) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_engine_with_gates_at_one_is_stock_peft(family: str) -> None:
    model = warm(lora(family))
    model.train()
    collected = []
    for with_gates in (False, True):
        model.zero_grad()
        gates = Gates(model, engine_name="reference") if with_gates else None
        torch.manual_seed(0)
        out = model(**batch())
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        collected.append({"logits": out.logits.detach(), **grads})
        if gates is not None:
            gates.detach()
    assert max_difference(*collected) == 0.0


def test_a_gate_of_zero_gives_zero_not_none() -> None:
    model = exact()
    gated(model, values=VALUES)
    model(**batch()).loss.backward()
    first = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    assert torch.equal(first.lora_B["default"].weight.grad, torch.zeros(16, 4, dtype=torch.float64))


def test_omega_is_no_part_of_the_module_tree() -> None:
    model = lora()
    before = ([n for n, _ in model.named_parameters()], list(model.state_dict()), [n for n, _ in model.named_modules()])
    gates = Gates(model)
    after = ([n for n, _ in model.named_parameters()], list(model.state_dict()), [n for n, _ in model.named_modules()])
    assert before == after
    assert gates.omega.is_leaf
    assert (gates.omega.dtype, gates.omega.shape) == (torch.float32, (6,))


def test_frozen_gates_get_no_gradient() -> None:
    model = warm(lora())
    gates = Gates(model, trainable=False)
    model(**batch()).loss.backward()
    assert gates.omega.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_in_mid_warm_up_it_is_plain_lora(family: str, tmp_path: Path) -> None:
    model = warm(lora(family))
    gates = Gates(model)
    gates.set(torch.linspace(-1, 2, len(gates)).round(decimals=1))
    live = logits(model, batch())
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(family), tmp_path)
    assert float((logits(stock, batch()) - live).abs().max()) < 1e-6
    gates.set(torch.ones(len(gates)))
    assert float((logits(model, batch()) - live).abs().max()) > 1e-3  # the gates did matter


def test_saving_leaves_the_live_factors_alone(tmp_path: Path) -> None:
    model = warm(lora())
    want = adapter_state(model)
    gates = Gates(model)
    gates.set(torch.tensor(VALUES))
    model.save_pretrained(tmp_path)
    gates.detach()
    assert max_difference(adapter_state(model), want) == 0.0


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe: bool) -> None:
    model = exact()
    gated(model, values=VALUES)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    live = logits(model, batch())
    model.merge_adapter(safe_merge=safe)
    assert float((logits(model, batch()) - live).abs().max()) < 1e-12
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert len(changed) == 4  # two of six gates are zero
    model.unmerge_adapter()
    assert float((logits(model, batch()) - live).abs().max()) < 1e-12
    assert max_difference({n: p.detach() for n, p in model.named_parameters()}, weights) < 1e-15


def test_disabled_adapters_are_the_base() -> None:
    model = exact()
    gated(model, values=VALUES)
    with model.disable_adapter():
        off = logits(model, batch())
    gates_off = logits(base("bert", dropout=0.0).double(), batch())
    # The head of a PEFT model is a copy of the base model's.
    assert torch.equal(off, gates_off)


def test_detach_restores_stock_peft_to_the_bit() -> None:
    twins = [warm(lora(seed=0)) for _ in range(2)]
    gates = Gates(twins[0], engine_name="autograd")
    twins[0](**batch()).loss.backward()
    twins[0].zero_grad()
    gates.detach()
    states = []
    for model in twins:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        torch.manual_seed(0)
        for _, inputs in zip(range(3), batches(), strict=False):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(adapter_state(model))
    assert max_difference(*states) == 0.0
    layers = [m for m in twins[0].modules() if getattr(m, "lora_variant", None) is not None]
    assert layers
    assert all(not layer.lora_variant and layer.cast_input_dtype_enabled for layer in layers)
    assert all(not layer._state_dict_hooks for layer in layers)


def test_raw_state_round_trip() -> None:
    model = exact()
    gates = gated(model, values=VALUES)
    state = gates.raw_state()
    live = logits(model, batch())
    gates.set(torch.ones(6, dtype=torch.float64))
    with torch.no_grad():
        for index in range(6):
            gates.factors(index)[1].zero_()
    assert float((logits(model, batch()) - live).abs().max()) > 1e-3
    gates.load_raw_state(state)
    assert torch.equal(logits(model, batch()), live)


def test_bf16_base_keeps_x_in_bf16() -> None:
    model = lora(dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    x = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    used = []
    for with_gates in (False, True):
        gates = Gates(model) if with_gates else None
        if gates is not None:
            own.add(gates.omega.untyped_storage().data_ptr())
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        used.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    h = 4 * 8 * 4 * 4
    assert used == [2 * x.nbytes + h, x.nbytes + h]  # stock PEFT keeps a float32 copy of x

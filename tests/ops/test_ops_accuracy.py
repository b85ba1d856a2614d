"""Three ways to compute one gated adapter: float64 as the truth, stock PEFT, ours. Ours may not be the worse one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.builders import a_third, pairs
from torch import Tensor, nn

from weightlora.graft.adapters import factors, lora_layers
from weightlora.graft.forms import Gates

# Both sides round in different places, so their errors scatter around each other. Over SEEDS draws together ours may be
# this much larger than stock's, ...
TOLERANCE = 0.1
# ... and where both are exact but for the last bit of float32 (one number, one sum), two units in that place.
LAST_BIT = 2 * torch.finfo(torch.float32).eps
SEEDS = 48


@dataclass(frozen=True, kw_only=True)
class Case:
    base: torch.dtype
    adapter: torch.dtype
    autocast: bool = False


CASES = {
    "fp32": Case(base=torch.float32, adapter=torch.float32),
    "bf16 base, fp32 adapters": Case(base=torch.bfloat16, adapter=torch.float32),
    "bf16": Case(base=torch.bfloat16, adapter=torch.bfloat16),
    "fp16": Case(base=torch.float16, adapter=torch.float16),
    "autocast": Case(base=torch.float32, adapter=torch.float32, autocast=True),
}
SHAPES = [((1, 1), 3, 5, 1), ((3, 7), 33, 17, 5), ((2, 4, 9), 65, 129, 8)]


def layer(case: Case, d_in: int, d_out: int, r: int, seed: int) -> nn.Module:
    """One linear layer with an adapter whose B is not zero."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(d_in, d_out)).to(case.base)
    model = get_peft_model(
        base, LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0"]), autocast_adapter_dtype=case.adapter != case.base
    )
    A, B = factors(next(one for _, one in lora_layers(model, "default")), "default")
    for factor in (A, B):
        nn.init.normal_(factor, std=0.5)
    assert A.dtype == case.adapter
    return model


def data(case: Case, lead: tuple[int, ...], d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, d_in, generator=generator).to(case.base)
    g = torch.randn(*lead, d_out, generator=generator).to(torch.bfloat16 if case.autocast else case.base)
    return x, g


def gradients(case: Case, model: nn.Module, x: Tensor, g: Tensor, omega: Tensor | None = None) -> dict[str, Tensor]:
    """The output and every gradient, in float64."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        out = model(x)
    out.backward(g.to(out.dtype))
    A, B = factors(next(one for _, one in lora_layers(model, "default")), "default")
    found = {"out": out.detach(), "x": x.grad, "A": A.grad, "B": B.grad}
    if omega is not None:
        found["omega"] = omega.grad
    assert all(value is not None for value in found.values())
    return {key: value.double() for key, value in found.items() if value is not None}


def truth(model: nn.Module, x: Tensor, g: Tensor, omega: float) -> dict[str, Tensor]:
    """The formula on the same numbers in float64."""
    peft_layer = next(one for _, one in lora_layers(model, "default"))
    A, B = (factor.detach().double() for factor in factors(peft_layer, "default"))
    base, s = peft_layer.get_base_layer(), float(peft_layer.scaling["default"])
    W, b = base.weight.double(), base.bias.double()
    flat, g = x.double().reshape(-1, x.shape[-1]), g.double().reshape(-1, g.shape[-1])
    dense = g.T @ flat
    return {
        "out": (flat @ (W + s * omega * B @ A).T + b).reshape(*x.shape[:-1], -1),
        "x": (g @ (W + s * omega * B @ A)).reshape(x.shape),
        "A": s * omega * B.T @ dense,
        "B": s * omega * dense @ A.T,
        "omega": s * (dense * (B @ A)).sum().reshape(1),
    }


Sizes = tuple[tuple[int, ...], int, int, int]  # leading dimensions of x, d_in, d_out, r


def errors(case: Case, shape: Sizes, omega: float, engine: str | None) -> dict[str, float]:
    """Distance to the truth over SEEDS draws, relative to its size. No engine: stock PEFT, the gate in its scaling."""
    lead, d_in, d_out, r = shape
    wrong: dict[str, float] = {}
    size: dict[str, float] = {}
    for seed in range(SEEDS):
        model = layer(case, d_in, d_out, r, seed)
        x, g = data(case, lead, d_in, d_out, seed)
        want = truth(model, x, g, omega)
        gate = None
        if engine is not None:
            gates = Gates(model, engine_name=engine, value=omega)  # type: ignore[arg-type]
            gate = gates.omega
        else:
            next(one for _, one in lora_layers(model, "default")).scaling["default"] *= omega
        for key, value in gradients(case, model, x, g, gate).items():
            wrong[key] = wrong.get(key, 0.0) + float((value - want[key]).square().sum())
            size[key] = size.get(key, 0.0) + float(want[key].square().sum())
    return {key: (wrong[key] / size[key]) ** 0.5 for key in wrong}


@pytest.mark.parametrize(("name", "shape", "omega"), a_third(pairs(list(CASES), SHAPES, [0.7, -1.3]), first=1), ids=str)
def test_our_error_is_not_larger_than_stock_pefts(name: str, shape: Sizes, omega: float) -> None:
    case = CASES[name]
    stock = errors(case, shape, omega, None)
    # Stock PEFT has no gate; its own operations with a gate multiplied on are the reference engine.
    stock["omega"] = errors(case, shape, omega, "reference")["omega"]
    ours = errors(case, shape, omega, "autograd")
    for key in ("out", "x", "A", "B", "omega"):
        assert ours[key] <= (1.0 + TOLERANCE) * stock[key] + LAST_BIT, (key, ours[key], stock[key])

"""Layer kinds that PEFT puts on quantised bases: the same numbers as PEFT's own forward, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from tests.builders import base, warm
from torch import Tensor, nn

from weightlora.errors import AdapterError, ExportError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.fast import fast_path
from weightlora.graft.forms import Gates
from weightlora.graft.surgery import disconnect


class Codes(nn.Module):
    """A linear layer that keeps bytes and one scale a row: the interface of GPTQ's and AWQ's layers, on any machine."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight * self.scale)


def built(kind: str) -> nn.Module:
    """A PEFT model of two layers of which "0" is quantised; B is not zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 3))
    if kind == "hqq":
        pytest.importorskip("hqq", reason="NO HQQ: bases quantised by it are not tested here")
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=4, group_size=16)
        net[0] = HQQLinear(net[0], settings, compute_dtype=torch.float32, device="cpu")
    elif kind == "torchao":
        pytest.importorskip("torchao", reason="NO TORCHAO: bases quantised by it are not tested here")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(net[0], Int8WeightOnlyConfig())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"])
    model = get_peft_model(net, config)
    layers = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "aqlm": AqlmLoraLinear}
    if kind in layers:
        inner = model.base_model.model
        made: Any = layers[kind]
        inner[0] = made(Codes(inner[0].get_base_layer()), "default", config=config, r=4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


KINDS = {"gptq": "GPTQLoraLinear", "hqq": "HqqLoraLinear", "torchao": "TorchaoLoraLinear"}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # torchao speaks of its kernels, PEFT of merging
def test_the_same_numbers_as_pefts_forward(kind: str, gated: bool) -> None:
    model: Any = built(kind)
    layer = model.base_model.model[0]
    assert type(layer).__name__ == KINDS[kind]
    assert [(a.name, a.shape) for a in adapters(model)] == [("0", (64, 48)), ("1", (48, 3))]
    x = torch.randn(7, 64, requires_grad=True)

    def run() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        out = model(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]

    want = [copy.deepcopy(t) for t in run()]
    assert len(want) == 6
    gates = Gates(model) if gated else None
    assert gated or fast_path(model, engine_name="autograd") == 2
    for one, other in zip(run(), want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)
    if gates is not None:
        assert gates.omega.grad is not None
        assert bool(gates.omega.grad.all())
        gates.set(torch.zeros(2))
        with model.disable_adapter():
            bare = model(x)
        assert torch.equal(model(x), bare)
        gates.detach()
    with pytest.raises(ExportError, match=r"is no Transformers model|the base model is quantised"):
        export(model, "nowhere", "merged", sample={"input": x.detach()})
    bare_layer = layer.get_base_layer()
    disconnect(model, ["0"])
    assert model.base_model.model[0] is bare_layer
    assert [a.name for a in adapters(model)] == ["1"]


@pytest.mark.filterwarnings("ignore")
def test_a_torchao_base_takes_no_adapter_in(tmp_path: Path) -> None:
    """Its tensors call themselves floating; what is merged into them would be rounded away."""
    pytest.importorskip("torchao", reason="NO TORCHAO: bases quantised by it are not tested here")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = base("llama")
    quantize_(plain, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith("q_proj"))
    model = warm(get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")))
    with pytest.raises(ExportError, match=r"the base model is quantised \(Linear at .*q_proj\), .* pass base="):
        export(model, tmp_path / "out", "merged")
    done = export(model, tmp_path / "out", "merged", base=base("llama"))
    assert "differ by" in done.notes[-1]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of our layer of bytes
@pytest.mark.parametrize("kind", ["awq", "aqlm"])
def test_layers_that_pass_variants_by_are_refused(kind: str) -> None:
    """A gate on one of these would have no effect and no gradient."""
    name = {"awq": "AwqLoraLinear", "aqlm": "AqlmLoraLinear"}[kind]
    model = built(kind)
    for use in (adapters, Gates, lambda m: export(m, "nowhere")):
        with pytest.raises(
            AdapterError, match=f"0 is a Codes under PEFT's {name}, which .* by bitsandbytes, GPTQ, HQQ"
        ):
            use(model)
    assert fast_path(model, engine_name="autograd") == 1  # the other layer

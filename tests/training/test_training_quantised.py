"""Whole runs on quantised bases, on a CPU: bitsandbytes', as Transformers loads them, others put in layer by layer."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import adapter_state, base, batch, logits, max_difference, trainer, warm
from tests.graft.test_graft_quantised import Codes
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from weightlora.errors import ExportError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.quantised import keep_unpacked
from weightlora.methods import WeightLoRAPlus
from weightlora.training import fit

CONFIGS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt", "hqq": "HqqLoraLinear", "torchao": "TorchaoLoraLinear",
          "gptq": "GPTQLoraLinear"}  # fmt: skip
GPTQMODEL = importlib.util.find_spec("gptqmodel") is not None
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "hqq": "hqq", "torchao": "torchao"}


def quantised(folder: Path, kind: str) -> LlamaForSequenceClassification:
    """The stored base with all its linear layers but the head quantised."""
    model: Any
    if kind in CONFIGS:
        config = BitsAndBytesConfig(**CONFIGS[kind], llm_int8_skip_modules=["score"])
        model = LlamaForSequenceClassification.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        keep_unpacked(model)  # so that stock PEFT computes with the kernel that trained
        return model  # type: ignore[no-any-return]
    model = LlamaForSequenceClassification.from_pretrained(folder)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "score")
        return model  # type: ignore[no-any-return]
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, by_hqq(linear) if kind == "hqq" else by_gptq(linear))
    return model  # type: ignore[no-any-return]


def by_hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=8, group_size=64)
    made: nn.Module = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
    return made


def by_gptq(linear: nn.Linear) -> nn.Module:
    """GPTQModel's layer of four bits, rounded to nearest; where it is not installed, one of its interface."""
    if not GPTQMODEL:
        return Codes(linear)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    groups = linear.weight.detach().reshape(linear.out_features, -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    made: Any = TorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=linear.bias is not None, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    made.pack(linear, scale, (-low / scale).round(), torch.arange(linear.in_features) // 32)
    made.post_init()
    made.eval()  # as GPTQModel leaves it; it compiles its forward when it is told to train
    made.train = lambda mode=True: made
    return made  # type: ignore[no-any-return]


def gptq_layers_are(kind: type[nn.Module], patch: pytest.MonkeyPatch) -> None:
    """Where GPTQModel is not installed, PEFT finds `kind` in its place."""
    module = types.ModuleType("gptqmodel.nn_modules.qlinear")
    module.BaseQuantLinear = kind  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr("peft.tuners.lora.gptq.is_gptqmodel_available", lambda: True)


def exports_open(result: Any, folder: Path, kind: str) -> None:
    """Stock PEFT opens the adapter on a quantised base of its own; merging asks for a whole base, and says the gap."""
    live = logits(result.model, batch())
    export(result, folder / "native")
    stock = PeftModel.from_pretrained(quantised(folder / "base", kind), folder / "native")
    assert torch.allclose(logits(stock, batch()), live, atol=1e-5)
    with pytest.raises(
        ExportError, match=r"the base model is quantised .*; load the full-precision base and pass base="
    ):
        export(result, folder / "no", "merged")
    full = LlamaForSequenceClassification.from_pretrained(folder / "base")
    done = export(result, folder / "merged", "merged", base=full, sample=batch())
    merged = LlamaForSequenceClassification.from_pretrained(folder / "merged")
    on_full = PeftModel.from_pretrained(full, folder / "native")
    assert max_difference({"": logits(on_full, batch())}, {"": logits(merged, batch())}) < 1e-4
    told = re.search(r"logits differ by (\S+) at most from the live model's", " ".join(done.notes))
    assert told is not None
    gap = float((logits(merged, batch()) - live).abs().max())
    assert gap > 1e-4
    assert float(told[1]) == pytest.approx(gap, rel=1e-2)


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights: as stored, or where a tensor calls itself floating, what it stands for."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        poses = type(tensor.data).__module__.startswith("torchao")
        if poses or not tensor.is_floating_point():
            stored = tensor.dequantize() if poses else tensor
            found[name.replace(".base_layer", "")] = stored.detach().clone()
    return found


@pytest.mark.filterwarnings("ignore")  # bitsandbytes says which of its CPU kernels it found, and that it casts
@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, seam, growth, to the end, and every export."""
    if kind == "gptq" and not GPTQMODEL:
        gptq_layers_are(Codes, monkeypatch)
    elif kind != "gptq":
        pytest.importorskip(PACKAGES[kind], reason=f"NO {PACKAGES[kind].upper()}: whole runs on it are not tested here")
    base("llama", width=64, dropout=0.0).save_pretrained(tmp_path / "base")

    def made() -> PeftModel:
        loaded = quantised(tmp_path / "base", kind)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
        torch.manual_seed(1)
        return warm(get_peft_model(loaded, config), 0.1)  # type: ignore[return-value]

    model = made()
    before, start = codes(model), adapter_state(model)
    kinds = {type(layer).__name__ for layer in model.modules()}
    assert LAYERS[kind] in kinds
    assert len({key.rpartition(".")[0] for key in before}) == 14
    method = WeightLoRAPlus.from_preset("paper", k=2, select_after=3)
    each = trainer(tmp_path / "run", model, steps=6, eval_strategy="steps", eval_steps=1)
    result = fit(each, method)
    # Survivors are grown and trained, the rest is the quantised layer alone, and no code has changed.
    assert result.selection is not None
    assert [(a.name, a.rank) for a in adapters(model)] == [(c.name, c.rank) for c in result.selection.kept]
    assert len(adapters(model)) == 2
    assert min(a.rank for a in adapters(model)) > 4
    after = codes(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    state = adapter_state(model)
    grown = [key for key in state if "lora_B" in key]
    assert len(grown) == 2
    assert all(not torch.equal(state[key][:, :4], start[key]) for key in grown)
    # What cannot be traced (weights whose kernels need their values) is not guessed at; what is said is what is kept.
    counted = {p.name: p.kept_activation_bytes for p in result.phases}
    said = {name: numbers["kept_activation_bytes"] for name, numbers in result.predicted.items()}
    assert said == ({} if kind in ("4bit", "8bit", "torchao") else counted)
    # To evaluate within the run has changed nothing.
    other = made()
    assert fit(trainer(tmp_path / "other", other, steps=6), method, measure=False).selection == result.selection
    assert max_difference(adapter_state(other), state) == 0.0
    exports_open(result, tmp_path, kind)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_was_evaluated_passes_gradients_on() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: its packing is not tested here")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(torch.nn.Linear(64, 64).state_dict())
    net = torch.nn.Sequential(layer.to("cpu"))
    packs = bool(layer.support_avx512bf16_for_cpu)
    x = torch.randn(5, 64)
    with torch.no_grad():
        net.eval()(x)
    assert keep_unpacked(net) == int(packs)
    assert keep_unpacked(net) == 0
    x.requires_grad_()
    net.train()(x).square().sum().backward()
    assert x.grad is not None
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    want = 2 * (x.detach().double() @ W.T + layer.bias.double()) @ W
    assert torch.allclose(x.grad.double(), want, rtol=1e-2, atol=1e-2)

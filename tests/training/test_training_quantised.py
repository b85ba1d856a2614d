"""Whole runs on bases that bitsandbytes has quantised, as Transformers loads them; on a CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import adapter_state, base, batch, logits, max_difference, trainer, warm
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from weightlora.errors import ExportError
from weightlora.graft import adapters, keep_unpacked
from weightlora.graft.export import export
from weightlora.methods import WeightLoRAPlus
from weightlora.training import fit

pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: whole runs on quantised bases are not tested here")
CONFIGS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


def quantised(folder: Path, kind: str) -> LlamaForSequenceClassification:
    config = BitsAndBytesConfig(**CONFIGS[kind], llm_int8_skip_modules=["score"])
    model: Any = LlamaForSequenceClassification.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    keep_unpacked(model)  # so that stock PEFT computes with the kernel that trained
    return model  # type: ignore[no-any-return]


def codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights, as stored."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}


@pytest.mark.filterwarnings("ignore")  # bitsandbytes says which of its CPU kernels it found, and that it casts
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_run(kind: str, tmp_path: Path) -> None:
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
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind] in kinds
    assert len(before) == 14
    method = WeightLoRAPlus.from_preset("paper", k=2, warmup_steps=3)
    each = trainer(tmp_path / "run", model, steps=6, eval_strategy="steps", eval_steps=1)
    result = fit(each, method)
    # Survivors are grown and trained, the rest is the quantised layer alone, and no code has changed.
    assert result.selection is not None
    assert [(a.name, a.rank) for a in adapters(model)] == [(c.name, c.rank) for c in result.selection.kept]
    assert len(adapters(model)) == 2
    assert min(a.rank for a in adapters(model)) > 4
    after = {key.replace(".base_layer", ""): value for key, value in codes(model).items()}
    assert after.keys() == {key.replace(".base_layer", "") for key in before}
    assert all(torch.equal(after[key.replace(".base_layer", "")], value) for key, value in before.items())
    state = adapter_state(model)
    grown = [key for key in state if "lora_B" in key]
    assert len(grown) == 2
    assert all(not torch.equal(state[key][:, :4], start[key]) for key in grown)
    assert result.predicted == {}  # what cannot be traced is not guessed at
    # To evaluate within the run has changed nothing.
    other = made()
    assert fit(trainer(tmp_path / "other", other, steps=6), method, measure=False).selection == result.selection
    assert max_difference(adapter_state(other), state) == 0.0
    # Exports: stock PEFT opens the adapter on a quantised base of its own.
    live = logits(model, batch())
    export(result, tmp_path / "native")
    stock = PeftModel.from_pretrained(quantised(tmp_path / "base", kind), tmp_path / "native")
    assert torch.allclose(logits(stock, batch()), live, atol=1e-5)
    with pytest.raises(
        ExportError, match=r"the base model is quantised .*; load the full-precision base and pass base="
    ):
        export(result, tmp_path / "no", "merged")
    full = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    done = export(result, tmp_path / "merged", "merged", base=full, sample=batch())
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    on_full = PeftModel.from_pretrained(full, tmp_path / "native")
    assert max_difference({"": logits(on_full, batch())}, {"": logits(merged, batch())}) < 1e-4
    told = re.search(r"logits differ by (\S+) at most from the live model's", " ".join(done.notes))
    assert told is not None
    gap = float((logits(merged, batch()) - live).abs().max())
    assert gap > 1e-4
    assert float(told[1]) == pytest.approx(gap, rel=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_was_evaluated_passes_gradients_on() -> None:
    import bitsandbytes as bnb

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

"""The profile ``gguf``, asked in llama.cpp itself: it says what the live model says."""

from __future__ import annotations

import itertools
import json
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import a_third
from tests.foreign import SECONDS, node_packages
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import weightlora as wl
from weightlora.errors import ExportError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.llama_cpp import ADAPTER, FAMILIES
from weightlora.graft.surgery import grow_adapters

NODE = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BUILD: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [1, 17, 5, 60, 33, 9, 9, 21]
TOLERANCE = 1e-4


def base(family: str) -> PreTrainedModel:
    config, kind, settings = BUILD[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = kind(config(**SIZES, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:  # all alike in a new model, where a mix-up would not be seen
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def wrapped(family: str, *, r: int = 4, targets: Sequence[str] = TARGETS) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(base(family), LoraConfig(r=r, lora_alpha=6, target_modules=list(targets)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write_base(model: PreTrainedModel, path: Path) -> None:
    """The base as llama.cpp's converter writes it, in float32, with a vocabulary of bytes."""
    config: Any = model.config
    arch, permuted = FAMILIES[config.model_type]
    number = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    kinds, extra = gguf.TokenType, config.vocab_size - 259
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"word{i}" for i in range(extra))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([kinds.CONTROL] * 3 + [kinds.BYTE] * 256 + [kinds.NORMAL] * extra)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.named_parameters():
        path_, _, leaf = name.rpartition(".")
        weight = parameter.detach().float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path_.split(".")[-1])
        if permuted and heads:
            rows = np.arange(weight.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            weight = weight[torch.from_numpy(rows)]
        writer.add_tensor(f"{names.get_name(path_)}.{leaf}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def said(model: PreTrainedModel | PeftModel, tokens: Sequence[int] = TOKENS) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([list(tokens)])).logits[0, -1]
    return logits.double().softmax(-1)


def by_llama_cpp(
    folder: Path, base: Path, files: Sequence[Path | None], tokens: Sequence[int] = TOKENS
) -> list[Tensor]:
    packages = node_packages("llama-cpp", *NODE)
    job = {"base": str(base), "tokens": list(tokens), "adapters": [file and str(file) for file in files]}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(
        ["node", str(script), str(packages), str(folder / "job.json"), str(folder / "answers.json")],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return [torch.tensor(each, dtype=torch.float64).softmax(-1) for each in answers]


def trained(model: PeftModel, method: Any, *, lr: float = 3e-2, tokens: Sequence[int] = TOKENS) -> PeftModel:
    """After a few steps of a plain loop, the seam among them, with steps so large that they are seen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    tuner = wl.attach(model, method, optimizer, max_steps=3)
    words = torch.tensor([tokens])
    for _ in range(3):
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    tuner.finish()
    assert tuner.selection is not None
    return model.eval()


def compare(folder: Path, live: dict[str, PeftModel], plain: Tensor, tokens: Sequence[int] = TOKENS) -> None:
    """llama.cpp and the live models agree, and no two of them say the same. `plain` is what the base says."""
    files: list[Path | None] = [None]
    for name, model in live.items():
        export(model, folder / name, profile="gguf", sample={"input_ids": torch.tensor([tokens])})
        files.append(folder / name / ADAPTER)
    found = by_llama_cpp(folder, folder / "base.gguf", files, tokens)
    expected = [plain, *(said(model, tokens) for model in live.values())]
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    for one, other in itertools.combinations(expected, 2):
        assert (one - other).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("family", a_third(FAMILIES, first=0))
def test_llama_cpp_says_what_the_live_model_says(family: str, tmp_path: Path) -> None:
    write_base(base(family), tmp_path / "base.gguf")
    live = {
        "all": wrapped(family),
        "weightlora": trained(wrapped(family), wl.WeightLoRA(k=5, select_after=2)),
        "weightlora+": trained(wrapped(family), wl.WeightLoRAPlus(k=4, select_after=2)),
        "upper layers": wrapped(family, targets=["2.self_attn.q_proj", "2.self_attn.k_proj", "1.mlp.down_proj"]),
    }
    grown = {adapter.rank for adapter in adapters(live["weightlora+"])}
    assert grown != {4}
    live["ranks differ"] = wrapped(family)
    names = [adapter.name for adapter in adapters(live["ranks differ"])]
    grow_adapters(live["ranks differ"], dict.fromkeys(names[::3], 7), generator=torch.Generator().manual_seed(1))
    for layer in (live["ranks differ"].get_base_model().get_submodule(name) for name in names[::4]):
        layer.scaling["default"] *= 2  # as if it had been trained with another alpha
    compare(tmp_path, live, said(base(family)))


@pytest.mark.long
def test_a_pretrained_language_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, in float32 here and there: a quarter of its 210 linears, grown."""
    tokens = AutoTokenizer.from_pretrained(smollm2)("The capital of France is").input_ids
    model = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    write_base(model, tmp_path / "base.gguf")
    plain = said(model, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    live = trained(tuned, wl.WeightLoRAPlus(k=0.25, select_after=2), lr=1e-3, tokens=tokens)
    compare(tmp_path, {"weightlora+": live}, plain, tokens)


def test_what_llama_cpp_cannot_have_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of what is refused here
        tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        model = get_peft_model(tied, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ExportError, match="lm_head is tied to the embedding"):
        export(model, tmp_path / "out", profile="gguf")
    model = get_peft_model(base("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ExportError, match=r"lm_head was trained as a whole, and llama.cpp loads no head"):
        export(model, tmp_path / "out", profile="gguf")
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config(**sizes)), LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    )
    with pytest.raises(ExportError, match=r"knows llama, mistral, qwen2, qwen3, and this model is 'gpt2'; use profile"):
        export(model, tmp_path / "out", profile="gguf")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_and_the_record(tmp_path: Path) -> None:
    done = export(wrapped("qwen2"), tmp_path / "out", profile="gguf")
    assert sorted(path.name for path in done.path.iterdir()) == ["README.md", ADAPTER, "export.json"]
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert "llama-server -m base.gguf --lora adapter.gguf" in card
    assert "library_name" not in card
    assert done.rank == 4
    assert any("convert_hf_to_gguf.py" in note for note in done.notes)

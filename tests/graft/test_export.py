"""Exports, opened again with stock PEFT or plain Transformers on a base that was built afresh."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from weightlora.errors import AdapterError, ConfigError, ExportError
from weightlora.graft import export as export_module
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.card import code
from weightlora.graft.export import Export, export
from weightlora.graft.forms import Gates
from weightlora.graft.profiles import complete
from weightlora.graft.selection import Choice, Selection
from weightlora.graft.surgery import disconnect, fold, grow_adapters
from weightlora.graft.verify import make_sample, plain_base

IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                         "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip


def _llama(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(**SMALL, **IDS, num_key_value_heads=1, tie_word_embeddings=tied, num_labels=3)


def _bart() -> BartConfig:
    return BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_attention_heads=2, decoder_ffn_dim=48, max_position_embeddings=40, num_labels=3, **IDS,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def _deberta() -> DebertaV2Config:
    return DebertaV2Config(
        **SMALL, num_labels=3, relative_attention=True, max_relative_positions=-1, position_buckets=8,
        share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0,
        norm_rel_ebd="layer_norm", pad_token_id=0,
    )  # fmt: skip


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
    "deberta": lambda: DebertaV2ForSequenceClassification(_deberta()),
    "llama": lambda: LlamaForCausalLM(_llama()),
    "llama-cls": lambda: LlamaForSequenceClassification(_llama()),
    "bart": lambda: BartForConditionalGeneration(_bart()),
    "bart-cls": lambda: BartForSequenceClassification(_bart()),
}
TARGETS = {
    "bert": ["query", "key", "value", "output.dense"],
    "deberta": ["query_proj", "key_proj", "value_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama-cls": ["q_proj", "k_proj", "v_proj"],
    "bart": ["q_proj", "k_proj", "v_proj", "fc1"],
    "bart-cls": ["q_proj", "k_proj", "v_proj"],
}
HEADS = {
    "bert": ["classifier"], "deberta": ["pooler", "classifier"], "llama-cls": ["score"],
    "bart-cls": ["classification_head"],
}  # fmt: skip
FUSED = [
    {"query", "key", "value"}, {"query_proj", "key_proj", "value_proj"}, {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
]  # fmt: skip
NAMES = list(BUILD)
PREFIX = "base_model.model."


def fresh(name: str) -> PreTrainedModel:
    """The pretrained base: the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return BUILD[name]().eval()


def wrapped(name: str, *, r: int = 4, alpha: int = 6, seed: int = 5, **settings: Any) -> PeftModel:
    """Stock PEFT on the base, with every factor and head as if trained."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=TARGETS[name], lora_dropout=0.1,
        task_type=settings.pop("task_type", "SEQ_CLS" if name in HEADS else None),
        modules_to_save=list(HEADS.get(name, [])) or None, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(fresh(name), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def operated(name: str) -> PeftModel:
    """After surgery: a third of the adapters, gates of either sign folded in, ranks and scales unequal."""
    model = wrapped(name)
    live = adapters(model)
    disconnect(model, [a.name for a in live if a.index % 3 != 1])
    kept = [a.name for a in adapters(model)]
    fold(model, {path: (-1) ** i * (0.5 + 0.3 * i) for i, path in enumerate(kept)})
    grow_adapters(model, {kept[0]: 8}, generator=torch.Generator().manual_seed(1))
    layer = model.get_base_model().get_submodule(kept[1])
    layer.scaling["default"] *= 2  # as if it had been trained with another alpha
    return model


def batch(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits in evaluation mode, straight through the model's own forward."""
    twin_mode = model.training
    with torch.no_grad():
        out = model.eval()(**inputs).logits
    model.train(twin_mode)
    return out


@contextmanager
def no_warnings() -> Iterator[None]:
    """Nothing is said on loading, but for one remark of Transformers on a name that PEFT reads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [f"{w.category.__name__}: {w.message}" for w in caught]
    assert [text for text in said if not re.match("FutureWarning: `is_gradient_checkpointing`", text)] == []


def reopen(name: str, folder: Path) -> PeftModel:
    """As a user would: a new base, the head if it lies apart, stock PEFT."""
    base = fresh(name)
    if (folder / "head.safetensors").exists():
        assert base.load_state_dict(load_file(folder / "head.safetensors"), strict=False).unexpected_keys == []
    with no_warnings():
        return PeftModel.from_pretrained(base, folder)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def file_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``{module: (A, B)}`` as they lie in the file, in which nothing but A and B may be."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", key) for key in tensors}
    assert None not in names
    paths = {match.group(1) for match in names if match}
    return {p: (tensors[f"{PREFIX}{p}.lora_A.weight"], tensors[f"{PREFIX}{p}.lora_B.weight"]) for p in paths}


@dataclass
class Result:
    """What a training run hands over, as far as an export needs it."""

    model: nn.Module
    selection: Selection | None


# ---------------------------------------------------------------------------------------------------------------------
# the four profiles, reopened independently


@pytest.mark.parametrize("name", NAMES)
def test_native_is_the_adapter_that_stock_peft_would_have_saved(name: str, tmp_path: Path) -> None:
    model = operated(name)
    done = export(model, tmp_path / "out")
    close(run(reopen(name, tmp_path / "out"), batch(name)), run(model, batch(name)))
    assert done.max_difference <= done.tolerance
    stock = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(written) == set(stock)
    assert all(torch.equal(written[key], stock[key]) for key in stock)


@pytest.mark.parametrize("name", NAMES)
def test_native_has_patterns_only_where_ranks_and_scales_differ(name: str, tmp_path: Path) -> None:
    model = operated(name)
    live = adapters(model)
    done = export(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    for adapter in live:
        rank = config["rank_pattern"].get(adapter.name, config["r"])
        assert rank == adapter.rank
        assert config["alpha_pattern"].get(adapter.name, config["lora_alpha"]) / rank == pytest.approx(adapter.scale)
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    assert len(config["rank_pattern"]) < len(live)
    assert config["target_modules"] == [a.name for a in live]
    assert config["inference_mode"] is True
    assert config["use_rslora"] is False
    assert config["modules_to_save"] == HEADS.get(name)
    assert done.rank == max(a.rank for a in live)
    assert any("vLLM" in note for note in done.notes)
    plain = wrapped(name)
    export(plain, tmp_path / "plain")
    config = config_of(tmp_path / "plain")
    assert (config["rank_pattern"], config["alpha_pattern"], config["r"], config["lora_alpha"]) == ({}, {}, 4, 6)


@pytest.mark.parametrize("profile", ["portable", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_server_profiles_reopen_and_keep_the_servers_rules(name: str, profile: str, tmp_path: Path) -> None:
    model = operated(name)
    live = {a.name: a for a in adapters(model)}
    factors = {path: (A.detach().clone(), B.detach().clone()) for path, (A, B) in parameters(model, "default").items()}
    done = export(model, tmp_path / "out", profile)
    close(run(reopen(name, tmp_path / "out"), batch(name)), run(model, batch(name)))

    config, pairs = config_of(tmp_path / "out"), file_pairs(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == done.rank == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    assert isinstance(config["target_modules"], list)
    assert set(config["target_modules"]) == set(pairs)
    assert "vLLM: --max-lora-rank 8" in done.notes
    for path, (A, B) in pairs.items():
        module = fresh(name).get_submodule(path)
        assert A.shape == (8, module.in_features)
        assert B.shape == (module.out_features, 8)
        if path in live:
            A0, B0 = factors[path]
            torch.testing.assert_close(B @ A, live[path].scale * B0 @ A0, rtol=1e-5, atol=1e-6)
        else:
            assert not A.any()
            assert not B.any()


@pytest.mark.parametrize("name", NAMES)
def test_portable_adds_exactly_the_rest_of_each_fused_group(name: str, tmp_path: Path) -> None:
    model = operated(name)
    live = {a.name for a in adapters(model)}
    export(model, tmp_path / "out", "portable")
    expected = set(live)
    for path in live:
        parent, _, kind = path.rpartition(".")
        for group in FUSED:
            if kind in group:
                expected |= {f"{parent}.{sibling}" for sibling in group}
    assert set(file_pairs(tmp_path / "out")) == expected
    assert len(expected) > len(live)
    order = [path for path, _ in fresh(name).named_modules() if path in expected]
    assert config_of(tmp_path / "out")["target_modules"] == order


@pytest.mark.parametrize("name", NAMES)
def test_dense_has_every_block_at_the_places_that_live_anywhere(name: str, tmp_path: Path) -> None:
    model = wrapped(name)
    live = [a.name for a in adapters(model)]
    disconnect(model, live[1:])  # one query projection is left, in block 0
    done = export(model, tmp_path / "out", "dense")
    close(run(reopen(name, tmp_path / "out"), batch(name)), run(model, batch(name)))
    kept = live[0]
    head, _, tail = kept.partition(".0.")
    parent, _, kind = tail.rpartition(".")
    siblings = next(group for group in FUSED if kind in group)
    blocks = len(fresh(name).get_submodule(head))
    assert set(file_pairs(tmp_path / "out")) == {
        f"{head}.{i}.{parent}.{sibling}" for i in range(blocks) for sibling in siblings
    }
    assert f"zero adapters were added on {3 * blocks - 1} modules at the same places of all blocks" in done.notes


@pytest.mark.parametrize("name", NAMES)
def test_merged_is_a_plain_transformers_model(name: str, tmp_path: Path) -> None:
    model = operated(name)
    done = export(model, tmp_path / "out", "merged")
    assert done.rank is None
    with no_warnings():
        plain, info = type(fresh(name)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in key for key in plain.state_dict())
    close(run(plain, batch(name)), run(model, batch(name)))
    stock = copy.deepcopy(model).merge_and_unload().state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, stock[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("profile", ["native", "portable", "dense", "merged"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_mid_warmup_gates_are_folded_and_closed_ones_left_out(name: str, profile: str, tmp_path: Path) -> None:
    model = wrapped(name)
    gates = Gates(model)
    omega = torch.linspace(-1.0, 1.5, len(gates))
    omega[::2] = 0.0
    gates.set(omega)
    truth = run(model, batch(name))
    done = export(model, tmp_path / "out", profile)
    again = (
        type(fresh(name)).from_pretrained(tmp_path / "out") if profile == "merged" else reopen(name, tmp_path / "out")
    )
    close(run(again, batch(name)), truth)
    zeros = int((omega == 0).sum())
    assert f"{zeros} of {len(omega)} adapters have a gate of zero and were left out" in done.notes
    if profile == "native":
        open_ = [a.name for a, w in zip(gates.adapters, omega.tolist(), strict=True) if w]
        assert config_of(tmp_path / "out")["target_modules"] == open_
        for path, (_, B) in file_pairs_with_head(tmp_path / "out").items():
            index = [a.name for a in gates.adapters].index(path)
            torch.testing.assert_close(B, gates.factors(index)[1].detach() * omega[index])
    assert gates.omega.detach().tolist() == omega.tolist()


def file_pairs_with_head(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = [key[len(PREFIX) :].removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    return {p: (tensors[f"{PREFIX}{p}.lora_A.weight"], tensors[f"{PREFIX}{p}.lora_B.weight"]) for p in paths}


# ---------------------------------------------------------------------------------------------------------------------
# heads, kinds of models, settings


def test_a_trained_head_lies_beside_a_portable_adapter_and_is_named(tmp_path: Path) -> None:
    model = operated("deberta")
    done = export(model, tmp_path / "out", "portable")
    head = load_file(tmp_path / "out" / "head.safetensors")
    base = model.get_base_model()
    assert set(head) == {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert torch.equal(head["classifier.weight"], base.classifier.modules_to_save["default"].weight)
    assert json.loads((tmp_path / "out" / "head.json").read_text())["modules"] == ["pooler", "classifier"]
    note = next(note for note in done.notes if "head" in note)
    assert "cannot travel" in note
    assert "head.safetensors (modules pooler, classifier)" in note
    # without the head the adapter computes something else: it is needed, and no other file holds it
    alone = PeftModel.from_pretrained(fresh("deberta"), tmp_path / "out")
    assert (run(alone, batch("deberta")) - run(model, batch("deberta"))).abs().max() > 1e-2
    export(operated("llama"), tmp_path / "headless", "portable")
    assert not (tmp_path / "headless" / "head.safetensors").exists()


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"r": 5, "alpha": 7}])
def test_stock_peft_models_that_never_saw_a_gate(settings: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped("llama", **settings)
    truth = run(model, batch("llama"))
    for profile in ("native", "portable", "dense"):
        export(model, tmp_path / profile, profile)
        close(run(reopen("llama", tmp_path / profile), batch("llama")), truth)
        config = config_of(tmp_path / profile)
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        assert config["init_lora_weights"] is True
    assert config["lora_alpha"] == config["r"]


def test_an_adapter_that_transformers_injected(tmp_path: Path) -> None:
    base = fresh("llama")
    base.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.05)
    truth = run(base, batch("llama"))
    for profile in ("native", "portable"):
        export(base, tmp_path / profile, profile)
        close(run(reopen("llama", tmp_path / profile), batch("llama")), truth)
    export(base, tmp_path / "merged", "merged")
    close(run(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), batch("llama")), truth)
    assert base.active_adapters() == ["default"]


def test_another_adapter_name_and_a_second_adapter(tmp_path: Path) -> None:
    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("second")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B.second" in key:
                parameter.fill_(0.05)
    truth = run(model, batch("llama"))
    export(model, tmp_path / "out")
    close(run(reopen("llama", tmp_path / "out"), batch("llama")), truth)
    assert config_of(tmp_path / "out")["r"] == 2
    with pytest.raises(ExportError, match=r"'default' is not active.*set_adapter"):
        export(model, tmp_path / "other", adapter="default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("profile", ["native", "portable", "merged"])
def test_other_precisions_keep_their_own_tolerance(dtype: torch.dtype, profile: str, tmp_path: Path) -> None:
    base = fresh("llama").to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    done = export(model, tmp_path / "out", profile)
    largest = max(1.0, float(run(model, make_sample(base)).double().abs().max()))
    share = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-10}[dtype]
    assert done.tolerance == pytest.approx(share * largest)
    assert done.max_difference <= done.tolerance


def test_tied_embeddings_are_saved_apart_when_only_one_of_them_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(_llama(tied=True)).eval()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    done = export(model, tmp_path / "out", "merged")
    close(run(LlamaForCausalLM.from_pretrained(tmp_path / "out"), batch("llama")), run(model, batch("llama")))
    assert any("tied" in note for note in done.notes)
    assert base.config.tie_word_embeddings is True
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight


def test_a_fully_trained_model_can_only_be_merged(tmp_path: Path) -> None:
    model = fresh("bert")
    done = export(Result(model, None), tmp_path / "out", "merged")
    assert done.max_difference == 0.0
    again = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    close(run(again, batch("bert")), run(model, batch("bert")))
    with pytest.raises(AdapterError, match="no LoRA adapters"):
        export(model, tmp_path / "native")


class Int8Linear(nn.Linear):
    """A linear layer that keeps its weight in eight bits, as quantised layers do."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().max() / 127
        new.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        new.register_buffer("scale", scale)
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised() -> PeftModel:
    base = fresh("llama")
    for block in base.model.layers:
        block.self_attn.q_proj = Int8Linear.of(block.self_attn.q_proj)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.03)
    return model


def test_nothing_is_merged_into_a_quantised_base(tmp_path: Path) -> None:
    model = quantised()
    with pytest.raises(ExportError, match=r"quantised \(Int8Linear at model.layers.0.self_attn.q_proj\).*base="):
        export(model, tmp_path / "no", "merged")
    base = fresh("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    export(model, tmp_path / "out", "merged", base=base)
    export(model, tmp_path / "native")
    truth = run(PeftModel.from_pretrained(fresh("llama"), tmp_path / "native"), batch("llama"))
    close(run(LlamaForCausalLM.from_pretrained(tmp_path / "out"), batch("llama")), truth)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters())
    assert not (tmp_path / "no").exists()


def test_another_base_must_have_the_same_structure(tmp_path: Path) -> None:
    model = operated("llama")
    with pytest.raises(ExportError, match=r"base= has no module 'model\.layers"):
        export(model, tmp_path / "out", "merged", base=fresh("bert"))
    wide = LlamaForCausalLM(LlamaConfig(**{**SMALL, "intermediate_size": 56}, **IDS, num_key_value_heads=2))
    with pytest.raises(ExportError, match="another shape"):
        export(model, tmp_path / "out", "merged", base=wide)
    with pytest.raises(ConfigError, match="merge"):
        export(model, tmp_path / "out", "native", base=fresh("llama"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# the live model stays as it was


def snapshot(model: PeftModel) -> dict[str, Any]:
    base = model.get_base_model()
    return {
        "parameters": {
            k: (id(p), p.detach().clone(), p.requires_grad, p._version) for k, p in model.named_parameters()
        },
        "buffers": {key: buffer.clone() for key, buffer in model.named_buffers()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "modules": {key: id(module) for key, module in model.named_modules()},
        "config": {key: copy.deepcopy(config.to_dict()) for key, config in model.peft_config.items()},
        "base config": base.config.to_dict(),
        "active": list(model.active_adapters),
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("profile", ["native", "portable", "dense", "merged"])
def test_the_live_model_and_the_random_state_are_untouched(profile: str, gated: bool, tmp_path: Path) -> None:
    model = operated("bert").train()
    model.get_base_model().bert.encoder.layer[1].eval()  # a mixed state, to be given back as it was
    gates = Gates(model) if gated else None
    if gates is not None:
        gates.set(torch.linspace(0.5, 2.0, len(gates)))
    loss = model(**batch("bert")).logits.square().mean()
    loss.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    before = snapshot(model)
    export(model, tmp_path / "out", profile)
    after = snapshot(model)
    for part, value in before.items():
        assert same(value, after[part]), part
    assert grads
    assert all(torch.equal(p.grad, grads[key]) for key, p in model.named_parameters() if p.grad is not None)


def test_the_plain_base_shares_memory_but_no_parameter_object(tmp_path: Path) -> None:
    model = operated("bert")
    root = model.get_base_model()
    plain = plain_base(root)
    stock = fresh("bert")
    assert [key for key, _ in plain.named_modules()] == [key for key, _ in stock.named_modules()]
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in plain.state_dict().items())
    live = {p.data_ptr(): p for p in root.parameters()}
    for key, p in plain.named_parameters():
        assert p is not live.get(p.data_ptr())
        # a head will be loaded into this one, so it is a copy
        assert (p.data_ptr() in live) == (not key.startswith("classifier"))


def test_the_same_export_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for profile in ("native", "portable"):
        for turn in ("a", "b"):
            export(operated("bert"), tmp_path / profile / turn, profile)
        for file in (tmp_path / profile / "a").iterdir():
            assert file.read_bytes() == (tmp_path / profile / "b" / file.name).read_bytes(), file.name


# ---------------------------------------------------------------------------------------------------------------------
# refusals, and nothing half-written


def test_an_export_that_differs_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = operated("llama")
    honest = export_module.write_adapter

    def spoilt(*args: Any) -> Any:
        result = honest(*args)
        file = args[1] / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if "lora_B" in key)
        from safetensors.torch import save_file

        save_file({**tensors, key: tensors[key] + 1.0}, file)
        return result

    monkeypatch.setattr(export_module, "write_adapter", spoilt)
    with pytest.raises(ExportError, match=r"differ from the live model's by \S+, more than the tolerance of 1"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export(model, tmp_path / "out")
    kept = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(export_module, "write_adapter", spoilt)
    with pytest.raises(ExportError, match="differ"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_stock_peft_reads_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export_module.write_adapter

    def spoilt(*args: Any) -> Any:
        result = honest(*args)
        config = PeftConfig.from_pretrained(args[1])
        config.target_modules = list(config.target_modules)[1:]
        config.save_pretrained(args[1])
        return result

    monkeypatch.setattr(export_module, "write_adapter", spoilt)
    with pytest.raises(ExportError, match="is not loaded"):
        export(operated("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    model, other = operated("llama"), wrapped("llama", seed=9)
    folder = tmp_path / "mine"
    folder.mkdir()
    export(model, folder)  # an empty folder is free
    export(other, folder, "portable")  # and so is an earlier export
    assert config_of(folder)["r"] == config_of(folder)["lora_alpha"] == 4
    assert json.loads((folder / "export.json").read_text())["profile"] == "portable"
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=r"'thesis.txt', which would be lost.*overwrite=True"):
        export(model, folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.txt").write_text("a")
    with pytest.raises(ExportError, match=r"not empty.*overwrite=True"):
        export(model, foreign)
    assert [path.name for path in foreign.iterdir()] == ["a.txt"]
    export(model, foreign, overwrite=True)
    assert not (foreign / "a.txt").exists()
    with pytest.raises(ExportError, match="is a file"):
        export(model, tmp_path / "mine" / "thesis.txt")


def test_a_path_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write the export to"):
        export(operated("llama"), tmp_path / "file" / "out")


def test_unknown_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'onnx' is unknown; use one of native, portable, dense, gguf, merged"):
        export(operated("llama"), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def unfrozen(model: PeftModel) -> PeftModel:
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def disabled(model: PeftModel) -> PeftModel:
    model.base_model.disable_adapter_layers()
    return model


def closed(model: PeftModel) -> PeftModel:
    Gates(model, value=0.0)
    return model


def merged(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: wrapped("bert", bias="all"), r"\d+ weights of the base .*bias: trained.*'native' or 'merged'"),
        (lambda: wrapped("llama", init_lora_weights="pissa"), "'pissa' moved a part of the base.*profile 'merged'"),
        (lambda: wrapped("llama", trainable_token_indices=[5]), "single tokens.*'native' or 'merged'"),
        (lambda: unfrozen(wrapped("llama")), r"1 weights .* \(model.norm.weight: trained\).*modules_to_save"),
        (lambda: merged(wrapped("llama")), r"merged into its base.*unmerge_adapter"),
        (lambda: disabled(wrapped("llama")), "disabled.*enable_adapter_layers"),
        (lambda: closed(wrapped("llama")), "every gate is zero"),
    ],
)
def test_models_that_an_adapter_file_cannot_hold(make: Callable[[], PeftModel], says: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        export(make(), tmp_path / "out", "portable")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_what_an_adapter_file_cannot_hold_can_be_merged(settings: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped("bert", **settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in key:
                parameter.add_(0.1)
    export(model, tmp_path / "out", "merged")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    close(run(again, batch("bert")), run(model, batch("bert")))


# ---------------------------------------------------------------------------------------------------------------------
# samples


def test_models_that_read_no_tokens_need_a_sample(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8))
    model = get_peft_model(vit, LoraConfig(r=2, target_modules=r".*(query|value|q_proj|v_proj)"))
    with pytest.raises(ExportError, match="sample="):
        export(model, tmp_path / "out")
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert export(model, tmp_path / "out", "portable", sample=pixels).max_difference <= 1e-5
    assert export(model, tmp_path / "merged", "merged", sample=pixels).max_difference <= 1e-5


def test_a_module_that_is_no_transformers_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    x = torch.randn(5, 4)
    export(model, tmp_path / "out", "portable", sample={"input": x})
    close(PeftModel.from_pretrained(net, tmp_path / "out")(x), model(x))
    with pytest.raises(ExportError, match="no Transformers model"):
        export(model, tmp_path / "merged", "merged", sample={"input": x})


@pytest.mark.parametrize("name", NAMES)
def test_made_up_samples_are_fixed_and_fit_the_model(name: str) -> None:
    base = fresh(name)
    sample = make_sample(base)
    again = make_sample(base)
    assert all(torch.equal(sample[key], again[key]) for key in sample)
    assert sample["input_ids"].shape == (8, 16)
    eos = base.config.eos_token_id
    if eos is not None:
        assert (sample["input_ids"] == eos).sum(1).tolist() == [1] * 8
    assert (sample["input_ids"] != base.config.pad_token_id).all()
    assert run(base, sample).isfinite().all()


def test_a_decoder_classifier_without_padding_takes_one_row(tmp_path: Path) -> None:
    config = _llama()
    config.pad_token_id = None
    model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(r=2, task_type="SEQ_CLS"))
    assert make_sample(model.get_base_model())["input_ids"].shape == (1, 16)
    assert export(model, tmp_path / "out").max_difference <= 1e-5


def test_a_broken_model_is_not_called_verified(tmp_path: Path) -> None:
    model = operated("llama")
    with torch.no_grad():
        next(iter(parameters(model, "default").values()))[1][0, 0] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# the papers beside the weights


def selection_of(model: PeftModel, why: str = "largest gates") -> Selection:
    return Selection(
        method="weightlora", preset="recommended", step=7, why=why,
        choices=tuple(
            Choice(name=a.name, kept=True, omega=0.5 + a.index, score=None, rank=a.rank, scale=a.scale)
            for a in adapters(model)
        ),
    )  # fmt: skip


def test_the_papers_say_what_was_kept_and_how_to_load(tmp_path: Path) -> None:
    model = operated("bert")
    model.peft_config["default"].base_model_name_or_path = "somebody/bert-base"
    selection = selection_of(model, why="omega | `rm -rf` \n# not a heading")
    done = export(Result(model, selection), tmp_path / "out", "portable")
    assert Selection.load(tmp_path / "out" / "selection.json") == selection
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: peft\nbase_model: "somebody/bert-base"\n')
    assert "\n# not a heading" not in text
    assert all(f"| `{name}` |" in text for name in selection.names)
    assert all(f"- {note}" in text for note in done.notes)
    source = text.split("```python\n")[1].split("```")[0]
    assert "PeftModel.from_pretrained(base" in source
    assert "head.safetensors" in source
    compile(source, "README.md", "exec")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["max_difference"] == done.max_difference
    assert sorted([*record["files"], "export.json"]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "somebody/bert-base"
    (tmp_path / "probe").write_text("")
    usual = (tmp_path / "probe").stat().st_mode
    assert all(path.stat().st_mode == usual for path in (tmp_path / "out").iterdir())


def test_code_spans_cannot_be_broken_out_of() -> None:
    assert code("model.layers.0") == "`model.layers.0`"
    assert code("a`b``c") == "``` a`b``c ```"
    assert code("x\n| y") == "`x \\| y`"


@pytest.mark.parametrize(("rank", "says"), [(1, "1"), (6, "8"), (16, "16"), (17, "32"), (200, "256")])
def test_the_rank_to_serve_with_is_named(rank: int, says: str, tmp_path: Path) -> None:
    model = wrapped("llama-cls", r=rank)
    assert f"vLLM: --max-lora-rank {says}" in export(model, tmp_path / "out", "portable").notes


def test_a_rank_that_vllm_refuses_is_named(tmp_path: Path) -> None:
    done = export(wrapped("llama-cls", r=513), tmp_path / "out", "portable")
    assert any("513 is more than the 512" in note for note in done.notes)


def test_the_export_is_a_frozen_record(tmp_path: Path) -> None:
    done = export(operated("llama"), str(tmp_path / "out"))
    assert isinstance(done, Export)
    assert (done.path, done.profile) == (tmp_path / "out", "native")
    with pytest.raises(AttributeError):
        done.rank = 3  # type: ignore[misc]


def test_zero_adapters_go_on_linear_layers_only() -> None:
    block = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Embedding(4, 4), "v_proj": nn.Linear(4, 4)})
    assert complete(nn.ModuleDict({"a": block}), {"a.q_proj": None}, everywhere=False) == ["a.v_proj"]  # type: ignore[dict-item]

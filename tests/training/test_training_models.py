"""Models that are not one adapter on linear layers of their own: several adapters, shared layers, GPT-2's Conv1D."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import VOCABULARY, adapter_state, batch, examples, logits, lora, max_difference, trainer, warm
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters, layer_weights, lora_layers
from weightlora.graft.export import export
from weightlora.methods import LoRA, Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import fit

GROWN = WeightLoRAPlus.from_preset("paper", k=2, select_after=3)


# several adapters on one model


@pytest.mark.parametrize("made", [GROWN, WeightLoRA(k=2, select_after=3)], ids=["gated", "credit"])
def test_other_adapters_are_left_to_the_bit(made: Method, tmp_path: Path) -> None:
    model = lora(task_type=None, modules_to_save=["classifier"], dropout=0.0)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["query", "output.dense"]))
    warm(model)

    def others() -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in model.state_dict().items() if ".other." in k}

    def answers() -> torch.Tensor:
        model.set_adapter("other")
        found = logits(model, batch())
        model.set_adapter("default")
        return found

    def settings() -> dict[str, Any]:
        # PEFT 0.20 writes down the base's name, an empty one, when it saves.
        return {**model.peft_config["other"].to_dict(), "base_model_name_or_path": None}

    state, config, want = others(), settings(), answers()
    result = fit(trainer(tmp_path, model, steps=6), made, measure=False)
    assert result.selection is not None
    assert result.selection.k == len(adapters(model)) == 2
    assert model.active_adapters == ["default"]
    assert others().keys() == state.keys()
    assert max_difference(others(), state) == 0.0
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    assert settings() == config
    assert torch.equal(answers(), want)
    assert not any(layer.lora_variant for _, layer in lora_layers(model, "other"))


# one layer that computes several times


def check_path(made: Callable[[], PeftModel], out: Path) -> None:
    """Our path trains to what PEFT's own forward trains to."""
    states = []
    for path in ("stock", "autograd"):
        each = trainer(out / path, made(), steps=5, optim="sgd")
        fit(each, LoRA(), engine=path, measure=False)  # type: ignore[arg-type]
        states.append(adapter_state(each.model))
    assert max_difference(*states) < 1e-5


def albert() -> PeftModel:
    torch.manual_seed(0)
    base = AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, initializer_range=0.2,
        )
    )  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value"], task_type="SEQ_CLS")
    return warm(get_peft_model(base, config), 0.2)  # type: ignore[return-value]


def test_a_layer_that_all_blocks_share(tmp_path: Path) -> None:
    """ALBERT's blocks are one block, run three times: every adapter gets the sum of three gradients."""
    check_path(albert, tmp_path)
    each = trainer(tmp_path / "gated", albert(), steps=6)
    result = fit(each, WeightLoRA.from_preset("paper", k=1, select_after=3))
    assert result.selection is not None
    assert len(adapters(each.model)) == result.selection.k == 1
    export(result, tmp_path / "out", "merged")


# GPT-2


def gpt2() -> PeftModel:
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )
    )  # fmt: skip
    targets = ["c_attn", "c_fc", "attn.c_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="SEQ_CLS", fan_in_fan_out=True)
    return warm(get_peft_model(base, config), 0.2)  # type: ignore[return-value]


def test_conv1d_is_a_linear_layer(tmp_path: Path) -> None:
    model = gpt2()
    found = {a.name.removeprefix("transformer.h.0."): a.shape for a in adapters(model)[:3]}
    assert found == {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64)}
    assert [tuple(w.shape[::-1]) for w in layer_weights(model, "default")] == [a.shape for a in adapters(model)]
    check_path(gpt2, tmp_path)
    each = trainer(tmp_path / "gated", model, steps=6)
    result = fit(each, GROWN)
    assert result.selection is not None
    assert len(adapters(model)) == 2
    export(result, tmp_path / "native")
    stock = PeftModel.from_pretrained(gpt2().unload(), tmp_path / "native")
    assert torch.allclose(logits(stock, batch()), logits(model, batch()), atol=1e-5)
    for profile in ("portable", "merged"):
        export(result, tmp_path / profile, profile)
    merged = GPT2ForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, batch()), logits(model, batch()), atol=1e-5)


# embeddings


@pytest.mark.parametrize("targets", [["word_embeddings"], ["word_embeddings", "query"]])
def test_lora_on_an_embedding_is_refused(targets: list[str], tmp_path: Path) -> None:
    each = trainer(tmp_path, lora(targets=targets))
    with pytest.raises(AdapterError, match=r"bert.embeddings.word_embeddings is an embedding with LoRA; only linear"):
        fit(each, WeightLoRA(k=1, select_after=3))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT writes the head's frozen weight, too
def test_a_head_tied_to_the_embedding_goes_through_the_seam(tmp_path: Path) -> None:
    """The head is linear, and its adapter its own: the table stays as it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=True, initializer_range=0.2,
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    table = base.model.embed_tokens.weight.detach().clone()
    each = trainer(tmp_path, warm(model), steps=6, data=[{**row, "labels": row["input_ids"]} for row in rows()])
    result = fit(each, WeightLoRA.from_preset("paper", k=1, select_after=3))
    assert result.selection is not None
    assert len(adapters(model)) == 1
    assert torch.equal(base.model.embed_tokens.weight, table)
    head: nn.Module = base.lm_head
    assert getattr(head, "base_layer", head).weight is base.model.embed_tokens.weight
    export(result, tmp_path / "out")


def rows() -> list[dict[str, torch.Tensor]]:
    from tests.builders import examples

    return [{k: v for k, v in row.items() if k != "labels"} for row in examples(16)]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_gpt2_is_the_stock_trainers_to_the_bit(tmp_path: Path) -> None:
    """Every adapter kept, measured, through the seam; of other families see ``tests/test_families.py``."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
    rows = [{**row, "labels": row["input_ids"]} for row in examples(16)]
    runs = []
    for name in ("stock", "fit"):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
        made = trainer(tmp_path / name, model, steps=4, data=rows, logging_steps=1)
        if name == "stock":
            made.train()
        else:
            result = fit(made, WeightLoRA(k=len(adapters(model)), select_after=2), engine="stock")
            for phase in result.phases:
                assert result.predicted[phase.name]["kept_activation_bytes"] == phase.kept_activation_bytes
        runs.append(made)
    logged = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in runs]
    assert logged[0] == logged[1]
    assert max_difference(*(adapter_state(run.model) for run in runs)) == 0.0

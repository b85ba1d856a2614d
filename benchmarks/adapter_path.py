"""What LoRA's adapters cost over the frozen model: bytes kept for backward, FLOPs, wall time; ours beside stock PEFT's.

    python benchmarks/adapter_path.py --shape deberta-v3-base --dropout 0.05
    python benchmarks/adapter_path.py --shape llama-3-8b --device cuda --seconds 120

Every row runs on the same model and the same batch. Counted figures (bytes, FLOPs) are exact and the same on any machine.
Times are medians of rounds in which every row takes its turn, and are given as a ratio to stock PEFT in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from weightlora.graft import Gates, disconnect, end_backward_at_lowest
from weightlora.graft.adapters import adapters, factors, lora_layers
from weightlora.graft.fast import fast_path, stock_path
from weightlora.training.measure import StepCost, isolated_rng, step_cost

QKV_BERT = ("query", "key", "value")
ALL_BERT = (*QKV_BERT, "attention.output.dense", "intermediate.dense", r"\d+.output.dense")
ALL_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its config (random weights), what is adapted, and the batch."""

    model: str
    config: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    named: str = ""
    options: dict[str, Any] = field(default_factory=dict)


# Vocabularies of the encoders are cut to 1,000 rows: an embedding table is only looked up, and costs neither kept bytes nor
# FLOPs. The language models' logits do cost; llama-3-8b has its real vocabulary.
_DEBERTA = {"vocab_size": 1000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": -1,
            "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
SHAPES: dict[str, Shape] = {
    "minilm": Shape(
        model="BertForSequenceClassification", config="BertConfig", targets=ALL_BERT, batch=32, length=64,
        sizes={"vocab_size": 1000, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        named=r"layer\.[45]\.attention\.self\.(query|value)|layer\.5\.attention\.self\.key",
    ),
    # The anchor of the paper's q/k/v setting; `named` is the paper's five: values of 8, 10, 11, query and key of 11.
    "deberta-v3-base": Shape(
        model="DebertaV2ForSequenceClassification", config="DebertaV2Config", sizes=_DEBERTA, batch=8, length=128,
        targets=("query_proj", "key_proj", "value_proj"),
        named=r"layer\.(8|10|11)\.attention\.self\.value_proj|layer\.11\.attention\.self\.(query|key)_proj",
    ),
    "bart-large": Shape(
        model="BartForConditionalGeneration", config="BartConfig", batch=4, length=128,
        sizes={"vocab_size": 1000, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12,
               "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096,
               "decoder_ffn_dim": 4096, "dropout": 0.0},
        targets=("q_proj", "k_proj", "v_proj"), named=r"decoder\.layers\.(9|10|11)\.self_attn\.v_proj",
    ),
    "llama-3-8b": Shape(
        model="LlamaForCausalLM", config="LlamaConfig", batch=1, length=2048, dtype=torch.bfloat16, targets=ALL_LLAMA,
        sizes={"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
               "rope_theta": 500000.0},
        named=r"layers\.(2[4-9]|3[01])\.(self_attn\.[qv]_proj|mlp\.down_proj)",
    ),
    "llama-512": Shape(
        model="LlamaForCausalLM", config="LlamaConfig", batch=4, length=256, dtype=torch.bfloat16, targets=ALL_LLAMA,
        sizes={"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
               "num_attention_heads": 8, "num_key_value_heads": 8},
        named=r"layers\.[67]\.(self_attn\.[qv]_proj|mlp\.down_proj)",
    ),
    "tiny": Shape(
        model="LlamaForCausalLM", config="LlamaConfig", batch=2, length=16, targets=ALL_LLAMA,
        sizes={"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 2, "num_key_value_heads": 2},
        named=r"layers\.1\.self_attn\.v_proj",
    ),
}  # fmt: skip


class DenseVariant(LoraVariant):  # type: ignore[misc]
    """The published code's forward, re-created: the dense update is built, weighted and multiplied with x, gate 0 or not."""

    def __init__(self, device: torch.device) -> None:
        self.gate = torch.ones((), device=device, requires_grad=True)

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        A, B = factors(module, active_adapter)
        delta = self.gate * (B @ A) * module.scaling[active_adapter]
        return result + F.linear(x.to(delta.dtype), delta).to(result.dtype)


def build(shape: Shape, device: str, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in training mode, frozen, with random weights, and one batch."""
    torch.manual_seed(seed)
    config = getattr(transformers, shape.config)(**shape.sizes)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            model = getattr(transformers, shape.model)(config)
        finally:
            torch.set_default_dtype(default)
    ids = torch.randint(4, shape.sizes["vocab_size"], (shape.batch, shape.length), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(shape.batch) % 2 if shape.model.endswith("Classification") else ids
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}
    model.config.use_cache = False
    return model.train().requires_grad_(False), batch


def target_pattern(shape: Shape) -> str:
    return r".*\.(?:%s)" % "|".join(t.replace(".", r"\.").replace(r"\d+\.", r"\d+\.") for t in shape.targets)

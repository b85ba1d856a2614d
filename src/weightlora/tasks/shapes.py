"""Shapes of real architectures as configurations: published ones to plan for, small ones for random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from weightlora.tasks import smollm2
from weightlora.tasks.task import Head

Values = Mapping[str, Any]

# Versions 2 and 3 share the relative attention.
_DEBERTA = {"model_type": "deberta-v2", "vocab_size": 128100, "relative_attention": True, "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0,
            "max_position_embeddings": 512, "layer_norm_eps": 1e-7, "pooler_dropout": 0.0,
            "pooler_hidden_act": "gelu", "pad_token_id": 0}  # fmt: skip
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "pad_token_id": 128001,
          "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128,
          "dtype": "bfloat16",
          "architectures": ["LlamaForCausalLM"]}  # fmt: skip
PUBLISHED: Mapping[str, Values] = MappingProxyType(
    {
        "deberta-v3-base": {**_DEBERTA, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                            "intermediate_size": 3072, "pooler_hidden_size": 768},
        "deberta-v3-large": {**_DEBERTA, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                             "intermediate_size": 4096, "pooler_hidden_size": 1024},
        "bart-large": {"model_type": "bart", "vocab_size": 50265, "d_model": 1024, "encoder_layers": 12,
                       "decoder_layers": 12, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
                       "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "max_position_embeddings": 1024,
                       "architectures": ["BartForConditionalGeneration"]},
        "llama-3-8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                       "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
                       "rope_theta": 500000.0},
        "llama-3.1-70b": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                          "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                          "rope_theta": 500000.0},
        smollm2.NAME: {"model_type": "llama", **smollm2.CONFIG},
    }
)  # fmt: skip
"""Values of published configs, so that planning for these models needs no network."""


@dataclass(frozen=True, kw_only=True)
class Small:
    """A small shape: its configuration, the heads that it can carry, and whether it is told a text's two halves."""

    values: Values
    heads: tuple[Head, ...] = ("sequence-classification", "question-answering")
    segments: bool = True

    @property
    def inputs(self) -> list[str]:
        """What the tokenizer feeds it."""
        return ["input_ids", *(["token_type_ids"] if self.segments else []), "attention_mask"]


# MiniLM's words: [PAD] = 0, [CLS] = 101, [SEP] = 102. BART pools at the last end-of-sentence token, Llama at the last
# that is not padding.
_WORDS = {"vocab_size": 30522, "pad_token_id": 0}
_ENDS = {**_WORDS, "bos_token_id": 101, "eos_token_id": 102, "max_position_embeddings": 512}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
SMALL: Mapping[str, Small] = MappingProxyType(
    {
        "bert-tiny-shape": Small(values={"model_type": "bert", **_WORDS, **_SIZES, "num_hidden_layers": 2}),
        "deberta-v2-small-shape": Small(
            values={**_DEBERTA, **_WORDS, **_SIZES, "conv_kernel_size": 3, "conv_act": "gelu"}
        ),
        "deberta-v3-small-shape": Small(values={**_DEBERTA, **_WORDS, **_SIZES}),
        "deberta-v3-base-shape": Small(values={**PUBLISHED["deberta-v3-base"], **_WORDS}),
        "bart-small-shape": Small(
            values={"model_type": "bart", **_ENDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
                    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
                    "decoder_ffn_dim": 128, "decoder_start_token_id": 102, "forced_eos_token_id": None},
            heads=("sequence-classification", "question-answering", "seq2seq-lm"),
            segments=False,
        ),
        "llama-small-shape": Small(
            values={"model_type": "llama", **_ENDS, **_SIZES, "num_key_value_heads": 2, "use_cache": False},
            heads=("sequence-classification", "question-answering", "causal-lm"),
            segments=False,
        ),
    }
)  # fmt: skip
"""Models with random weights that :func:`weightlora.tasks.load_model` builds."""


def config_of(values: Values, **settings: Any) -> PreTrainedConfig:
    """The configuration that some values describe."""
    return AutoConfig.for_model(**{**values, **settings})

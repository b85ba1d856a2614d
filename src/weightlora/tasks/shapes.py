"""Small models of real architectures with random weights: a configuration each, and what the tokenizer feeds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import BartConfig, BertConfig, DebertaV2Config, LlamaConfig, PreTrainedConfig

from weightlora.tasks.task import Head

VOCABULARY = 30522  # MiniLM's: [PAD] = 0, [CLS] = 101, [SEP] = 102

BERT_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
PLAIN_INPUTS = ["input_ids", "attention_mask"]
Shape = Callable[..., tuple[PreTrainedConfig, list[str]]]


def _bert_tiny(**settings: Any) -> tuple[PreTrainedConfig, list[str]]:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        pad_token_id=0,
        **settings,
    )
    return config, BERT_INPUTS


_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


def _deberta(**settings: Any) -> DebertaV2Config:
    """The shape and the relative attention that versions 2 and 3 share."""
    # Read by the model, but not fields of the config class.
    settings |= {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    return DebertaV2Config(
        vocab_size=VOCABULARY,
        relative_attention=True,
        max_relative_positions=-1,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        pooler_hidden_act="gelu",
        pooler_dropout=0.0,
        pad_token_id=0,
        **{**_SMALL, **settings},
    )


def _deberta_v2_small(**settings: Any) -> tuple[PreTrainedConfig, list[str]]:
    return _deberta(conv_kernel_size=3, conv_act="gelu", **settings), BERT_INPUTS


def _deberta_v3_small(**settings: object) -> tuple[PreTrainedConfig, list[str]]:
    return _deberta(**settings), BERT_INPUTS


def _deberta_v3_base(**settings: object) -> tuple[PreTrainedConfig, list[str]]:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return _deberta(**sizes, **settings), BERT_INPUTS


def _bart_small(**settings: Any) -> tuple[PreTrainedConfig, list[str]]:
    # BART pools at the last end-of-sentence token: the tokenizer's [SEP].
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        decoder_start_token_id=102,
        forced_eos_token_id=None,
        **settings,
    )
    return config, PLAIN_INPUTS


def _llama_small(**settings: Any) -> tuple[PreTrainedConfig, list[str]]:
    # Llama pools at the last token that is not padding, so it must know the padding token.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        use_cache=False,
        **settings,
    )
    return config, PLAIN_INPUTS


_READERS: tuple[Head, ...] = ("sequence-classification", "question-answering")

SHAPES: Mapping[str, tuple[Shape, tuple[Head, ...]]] = MappingProxyType(
    {
        "bert-tiny-shape": (_bert_tiny, _READERS),
        "deberta-v2-small-shape": (_deberta_v2_small, _READERS),
        "deberta-v3-small-shape": (_deberta_v3_small, _READERS),
        "deberta-v3-base-shape": (_deberta_v3_base, _READERS),
        "bart-small-shape": (_bart_small, (*_READERS, "seq2seq-lm")),
        "llama-small-shape": (_llama_small, (*_READERS, "causal-lm")),
    }
)
"""Builder of each shape, and the heads it can carry."""

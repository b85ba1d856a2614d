"""Models without weights: what a planner needs to know of one, from a name, a folder, or a config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from weightlora.errors import ConfigError
from weightlora.tasks import models, smollm2
from weightlora.tasks.layers import Layers, layers_of
from weightlora.tasks.models import CLASSIFICATION
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from weightlora.tasks.task import Head

HEADS: tuple[str, ...] = get_args(Head)
# Well-known shapes, so that planning for them needs no network. The values are those of the published configs.
_DEBERTA = {"model_type": "deberta-v2", "vocab_size": 128100, "relative_attention": True, "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0,
            "max_position_embeddings": 512, "layer_norm_eps": 1e-7, "pooler_dropout": 0.0,
            "pooler_hidden_act": "gelu", "pad_token_id": 0}  # fmt: skip
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "pad_token_id": 128001,
          "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128,
          "dtype": "bfloat16",
          "architectures": ["LlamaForCausalLM"]}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
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
"""Shapes that :func:`skeleton` knows beside `MODELS`."""


@dataclass(frozen=True, kw_only=True)
class Skeleton(Layers):
    """A model on the meta device. ``heads``: modules that will be new and train."""

    model: PreTrainedModel
    name: str
    head: Head
    heads: tuple[str, ...]

    def batch(self, size: int, length: int) -> dict[str, Tensor]:
        """Token ids, labels, and for classification a mask that leaves out a little, as batches of sentences do.

        Language models are fed full rows, as packing makes them, and no mask.
        """
        config = self.model.config
        ids = torch.full((size, length), 5)
        if self.head != CLASSIFICATION:
            if self.head in models.LANGUAGE:
                return {"input_ids": ids, "labels": ids}
            ends = torch.zeros(size, dtype=torch.int64)
            return {"input_ids": ids, "start_positions": ends, "end_positions": ends}
        mask = torch.ones_like(ids)
        if length > 1:
            mask[-1, -1] = 0
            ids[:, -2] = config.eos_token_id if isinstance(getattr(config, "eos_token_id", None), int) else 5
            ids[-1, -1] = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
        floating = config.num_labels == 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(size).to(_label_dtype(floating))}


def _label_dtype(floating: bool) -> torch.dtype:
    return torch.float32 if floating else torch.int64


def skeleton(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    head: Head | None = None,
    num_labels: int = 2,
    device: str = "meta",
) -> Skeleton:
    """Build a model from its config alone; on the meta device, no weights are read or allocated.

    Args:
        name: one of `MODELS` or `SHAPES`, a hub name, a folder with a config.json, or such a file.
        dtype: of the weights; default: what the config says, else float32.
        head: what is on top; default: what the config's ``architectures`` say, else classification.
        num_labels: of a classification.
        device: another one makes random weights there.

    Raises:
        ConfigError: no such model, or one without that head.

    >>> built = skeleton("llama-3-8b")
    >>> built.head, built.model.dtype, len(built.linear_targets), sum(p.numel() for p in built.model.parameters())
    ('causal-lm', torch.bfloat16, 224, 8030261248)
    """
    config = _config(name)
    head = head or _head(config)
    if head == CLASSIFICATION:
        config.num_labels = num_labels
    elif isinstance(config, MeanPooledBertConfig):
        config = BertConfig.from_pretrained(models.minilm_folder())
    if head != CLASSIFICATION and getattr(config, "use_cache", False):
        config.use_cache = False
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0
    given = getattr(config, "dtype", None)
    dtype = dtype or (given if isinstance(given, torch.dtype) else torch.float32)
    try:
        with models.quiet(), torch.device(device):
            if isinstance(config, MeanPooledBertConfig):
                model = MeanPooledBertForSequenceClassification(config).to(dtype)  # type: ignore[arg-type]
            else:
                sees = head == "causal-lm" and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
                kind = AutoModelForImageTextToText if sees else models.CLASSES[head]
                model = kind.from_config(config, dtype=dtype)
    except (ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise ConfigError(f"model {name!r} cannot be built with the head {head!r} ({reason})") from None
    return Skeleton(
        model=model.train(),
        name=name,
        head=head,
        heads=models.find_heads(name, head, model, set()),
        **vars(layers_of(model)),
    )


def _config(name: str) -> PreTrainedConfig:
    if name in SHAPES:
        values = dict(SHAPES[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if name == "minilm":
        values = BertConfig.from_pretrained(models.minilm_folder()).to_dict()
        return MeanPooledBertConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    if name in models.MODELS:
        return models.shape_config(name)
    path = Path(name).expanduser()
    known = tuple(dict.fromkeys((*models.MODELS, *SHAPES)))
    source = str(path) if path.is_file() else models.find_model(name, known=known)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"the config of model {name!r} cannot be read ({reason}); pass {', '.join(known)}, a hub name, or a folder"
            " with a config.json"
        ) from None


def _head(config: PreTrainedConfig) -> Head:
    if models.is_decoder_checkpoint(config) or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "causal-lm"
    named = (config.architectures or [""])[0]
    return "seq2seq-lm" if named.endswith("ForConditionalGeneration") else CLASSIFICATION

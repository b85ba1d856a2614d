"""What of a model can be fitted to a task layer by layer, by its full names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# Last names of query, key and value projections, over the architectures of Transformers.
ATTENTION_NAMES = (
    *("query", "key", "value", "query_proj", "key_proj", "value_proj", "q_proj", "k_proj", "v_proj"),
    *("q_lin", "k_lin", "v_lin", "q", "k", "v", "qkv", "Wqkv", "qkv_proj", "query_key_value", "in_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers and stacks of matrices in the blocks of a model, in model order.

    Args:
        linear_targets: full names of every linear layer in the backbone's blocks; of a model that also sees images or
            hears, those of its language tower.
        attention_targets: last names of the query, key and value projections among them.
        expert_targets: full names of the parameters in which a mixture stacks its experts' matrices.
        vision_targets: linear layers in the blocks of the other towers, and in what joins them to the language tower.
    """

    linear_targets: tuple[str, ...]
    attention_targets: tuple[str, ...]
    expert_targets: tuple[str, ...] = ()
    vision_targets: tuple[str, ...] = ()


def layers_of(model: PreTrainedModel) -> Layers:
    """Everything in a numbered block of the backbone: heads, poolers and embeddings have no number.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> found = layers_of(BertForSequenceClassification(BertConfig(**sizes)))
    >>> found.linear_targets[0], found.attention_targets, found.expert_targets
    ('bert.encoder.layer.0.attention.self.query', ('query', 'key', 'value'), ())
    """
    # T5's language model has its stacks beside its head, and nothing under the name of its backbone.
    body = getattr(model, model.base_model_prefix, model)
    one_tower = model.config.get_text_config() is model.config
    language = body if one_tower else model.get_decoder()
    linear = tuple(_linear(model, language))
    others = () if one_tower else tuple(name for name in _linear(model, body) if name not in set(linear))
    last_names = {name.rsplit(".", 1)[-1] for name in linear}
    return Layers(
        linear_targets=linear,
        attention_targets=tuple(last for last in ATTENTION_NAMES if last in last_names),
        expert_targets=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and "experts" in name.split(".") and _numbered(name)
        ),
        vision_targets=others,
    )


def _linear(model: nn.Module, tower: nn.Module) -> Iterator[str]:
    inside = {id(module) for module in tower.modules()}
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is tower)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in inside and _numbered(name.removeprefix(prefix)):
            yield name


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))

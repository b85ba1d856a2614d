"""The adapter added into the weights of a plain model."""

from __future__ import annotations

import copy
from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weightlora.errors import ExportError
from weightlora.graft.adapters import base_of
from weightlora.graft.profiles import Live
from weightlora.graft.verify import device_of, plain_base


def merge(live: Live, base: nn.Module | None) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A plain model with ``W + s omega B A`` in the place of W and the trained heads in theirs; it shares the rest.

    Raises:
        ExportError: the model to merge into is quantised, is no Transformers model, or has another structure.
    """
    plain = plain_base(live.root if base is None else base_of(base))
    if not isinstance(plain, PreTrainedModel):
        raise ExportError(f"{type(plain).__name__} is no Transformers model and cannot be saved as one; use 'native'")
    quantised = bool(getattr(plain, "is_quantized", False) or getattr(plain.config, "quantization_config", None))
    shared = _shared_parameters(plain)
    untied = False
    for path, pair in live.pairs.items():
        where, leaf = (path, "weight") if pair.experts is None else path.rsplit(".", 1)
        linear = _submodule(plain, where)
        weight = getattr(linear, leaf, None)
        # A tensor of a class of its own, such as torchao's, may say that it is floating and yet round what it is given.
        own_kind = type(weight) not in (nn.Parameter, Tensor)
        if quantised or not isinstance(weight, Tensor) or own_kind or not weight.is_floating_point():
            raise ExportError(
                f"the base model is quantised ({type(linear).__name__} at {path}), and merging would round the adapter"
                " away; load the full-precision base and pass base=..."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = pair.delta(wide)
        delta = delta.T if isinstance(linear, Conv1D) else delta
        if weight.shape != delta.shape:
            raise ExportError(f"{path} has another shape in base= than under the adapter; pass the same model")
        untied |= id(weight) in shared
        merged = nn.Parameter((weight.to(wide) + delta.to(weight.device)).to(weight.dtype), requires_grad=False)
        setattr(linear, leaf, merged)
    for path, head in live.heads.items():
        untied |= any(id(p) in shared for p in _submodule(plain, path).parameters())
        parent, _, child = path.rpartition(".")
        setattr(plain.get_submodule(parent), child, copy.deepcopy(head).to(device_of(plain)))
    untied |= _merge_tokens(plain, live)
    if not untied:
        return plain, live.notes
    plain.config.tie_word_embeddings = plain.config.get_text_config().tie_word_embeddings = False
    return plain, (*live.notes, "input and output embeddings were tied; they differ now and are saved apart")


def _merge_tokens(plain: nn.Module, live: Live) -> bool:
    """Put trained rows into embeddings; returns whether one was tied to something that keeps the old rows."""
    made: dict[int, tuple[object, nn.Parameter]] = {}
    for path, wrapper in live.tokens.items():
        module = cast(nn.Embedding, _submodule(plain, path))
        old, rows = module.weight, wrapper.token_adapter.trainable_tokens_delta[live.name].detach()
        index = torch.tensor(wrapper.token_adapter.token_indices[live.name], device=old.device)
        if id(old) not in made:
            made[id(old)] = old, nn.Parameter(old.detach().index_copy(0, index, rows.to(old)), requires_grad=False)
        module.weight = made[id(old)][1]
    return any(p is old for m in plain.modules() for p in m._parameters.values() for old, _ in made.values())


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ExportError(
            f"base= has no module {path!r}, where the model has an adapter or a head; pass the same model, unquantised"
        ) from None


def _shared_parameters(model: nn.Module) -> set[int]:
    seen = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {key for key, times in Counter(seen).items() if times > 1}

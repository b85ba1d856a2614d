"""The directions of every layer's inputs that explain most variance, by PEFT's implementation of EVA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.adapters import adapter_name, adapters, lora_layers

PASSES = 100  # over the batches, until directions hold still; PEFT itself goes on for ever


def input_directions(
    model: nn.Module,
    batches: Sequence[Mapping[str, object]],
    compute: Callable[[Mapping[str, object]], object],
    rho: float,
) -> list[Tensor]:
    """Right singular vectors of every adapted layer's inputs, as many as EVA gives it ranks.

    Args:
        model: a PEFT model with plain LoRA adapters, in evaluation mode.
        batches: that take turns.
        compute: runs the model on a batch.
        rho: an adapter gets at most `rho` times its rank.

    Returns:
        For each adapter in module order ``(count, d_in)``; the counts add up to the sum of the ranks.

    Raises:
        AdapterError: the model is no ``PeftModel``.
        ConfigError: a batch has fewer tokens than an adapter may get directions, or directions do not hold still.

    Source: Paischer et al. 2024, as in PEFT. Padding, and tokens without a label where each has one, are left out.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError("PEFT finds EVA's directions on a model of peft.get_peft_model; wrap yours by that")
    name = adapter_name(model)
    config = cast(LoraConfig, copy(model.peft_config[name]))
    config.eva_config = EvaConfig(rho=rho)
    # Its own count of ranks is by name patterns, which say nothing of ranks that were changed since.
    live = adapters(model, name)
    config.r, config.rank_pattern = live[0].rank, {a.name: a.rank for a in live if a.rank != live[0].rank}
    most = max(round(a.rank * rho) for a in live)
    if (narrow := next((a for a in live if round(a.rank * rho) > a.d_in), None)) is not None:
        raise ConfigError(
            f"{narrow.name} has {narrow.d_in} inputs, fewer than rho={rho} times its rank {narrow.rank}; lower rho or r"
        )
    turns = 0

    def tokens(batch: Mapping[str, Tensor], _config: object) -> Tensor | None:
        mask = batch.get("attention_mask")
        labels = batch.get("labels")
        if mask is None:
            return None
        kept = mask.bool()
        if labels is not None and labels.shape == mask.shape:
            kept = kept & (labels != -100)
        if int(kept.sum()) < most:
            raise ConfigError(
                f"a batch has {int(kept.sum())} tokens to look at, fewer than the {most} directions that an adapter may"
                " get; give larger batches (per_device_eval_batch_size), or a lower r or rho"
            )
        return kept

    def inputs(given: Tensor | tuple[Tensor, ...], kept: Tensor | None, _name: str) -> Tensor:
        x = given[0] if isinstance(given, tuple) else given
        return x[kept.to(x.device)] if kept is not None and x.shape[:-1] == kept.shape else x.reshape(-1, x.shape[-1])

    def forward(_model: nn.Module, batch: Mapping[str, object]) -> None:
        nonlocal turns
        turns += 1
        if turns > PASSES * len(batches):
            raise ConfigError(
                f"EVA's directions still move after {PASSES} passes over {len(batches)} batches; give more batches"
            )
        compute(batch)

    with torch.no_grad():
        found = get_eva_state_dict(
            model,
            batches,
            config,
            forward_fn=forward,
            prepare_model_inputs_fn=tokens,
            prepare_layer_inputs_fn=inputs,
            adapter_name=name,
            gather_distributed_inputs=False,  # every process has all of them
            show_progress_bar=False,
        )
    return [found[path] for path in _paths(model, name)]


def _paths(model: nn.Module, name: str) -> list[str]:
    """Where each adapter's layer is in the whole model."""
    place = {id(module): path for path, module in model.named_modules()}
    return [place[id(layer)] for _, layer in lora_layers(model, name)]

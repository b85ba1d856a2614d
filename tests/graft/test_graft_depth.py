"""The backward pass ends at the lowest live adapter, whatever gradient checkpointing switched on before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.builders import batch, lora, max_difference, warm
from torch import Tensor, nn

from weightlora.graft.adapters import adapters
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest
from weightlora.graft.surgery import disconnect

LAYERS = 4
families = pytest.mark.parametrize("family", ["bert", "llama", "deberta"])


def only_block(model: nn.Module, block: int) -> None:
    disconnect(model, [a.name for a in adapters(model) if a.block != block])


def blocks(model: nn.Module) -> list[nn.Module]:
    core = model.base_model.model  # type: ignore[union-attr]
    inner = getattr(core, core.base_model_prefix)  # type: ignore[arg-type,union-attr]
    return list(inner.layers if hasattr(inner, "layers") else inner.encoder.layer)


def forward(model: nn.Module) -> tuple[Tensor, list[bool]]:
    """The loss, and for the embeddings and each block whether its output is part of the backward pass."""
    seen: list[bool] = []

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    embeddings = model.base_model.model.get_input_embeddings()  # type: ignore[operator,union-attr]
    hooks = [m.register_forward_hook(look) for m in (embeddings, *blocks(model))]
    torch.manual_seed(0)
    loss = model(**batch()).loss
    for hook in hooks:
        hook.remove()
    return loss, seen


@families
def test_input_gradients_go_off_and_stay_off(family: str) -> None:
    model = warm(lora(family, LAYERS))
    model.train()
    hugging = model.base_model.model
    for _ in range(2):  # the second call overwrites the handle of the first hook
        checkpoint_blocks(hugging, {"use_reentrant": False})
        hugging.enable_input_require_grads()
    only_block(model, 2)
    assert forward(model)[1] == [True] * (LAYERS + 1)
    assert end_backward_at_lowest(model) >= 2
    lowered = [False, False, False, True, True]
    assert forward(model)[1] == lowered
    for again in (hugging.enable_input_require_grads, model.enable_input_require_grads):
        again()
    checkpoint_blocks(hugging, {"use_reentrant": False})
    checkpoint_blocks(model, {"use_reentrant": False})
    assert forward(model)[1] == lowered
    assert end_backward_at_lowest(model) == 0


@families
def test_gradients_are_those_without_checkpointing(family: str) -> None:
    collected = []
    for recompute in (False, True):
        model = warm(lora(family, LAYERS))
        model.train()
        if recompute:
            checkpoint_blocks(model.base_model.model, {"use_reentrant": False})
        only_block(model, 1)
        end_backward_at_lowest(model)
        loss, seen = forward(model)
        assert seen == [False, False, True, True, True]
        loss.backward()
        collected.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(collected[0]) >= 2 * 3 + 1
    assert max_difference(*collected) == 0.0


def test_a_model_without_such_hooks_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(lambda *_: None)
    assert end_backward_at_lowest(net) == 0
    assert len(net[0]._forward_hooks) == 1

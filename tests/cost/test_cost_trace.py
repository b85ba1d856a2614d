"""Predicted kept bytes against bytes counted on the real model, with the adapters really disconnected."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.builders import ALL_LINEAR, FAMILIES, QKV, a_third, batch, lora, pairs
from torch import Tensor, nn

from weightlora.cost import ActivationTrace, kept_bytes, trace
from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest
from weightlora.graft.fast import fast_path
from weightlora.graft.surgery import disconnect

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIVE = ("all", "random", "deepest", "lowest")


def build(
    family: str, *, dtype: str = "fp32", dropout: float = 0.05, layers: int = 2, targets: Any = None
) -> PeftModel:
    """All linear layers, adapters in float32 as PEFT makes them; the base in `dtype`, with dropout of its own."""
    model = lora(family, layers, dropout=0.1, targets=targets or ALL_LINEAR[family])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(DTYPES[dtype])
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Dropout):
            module["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    return model.train()


def rows(count: int = 4) -> dict[str, Tensor]:
    found = batch(count)
    found["attention_mask"][-1, 0] = 0  # so that no model may leave the mask away
    return found


def loss_of(model: nn.Module, inputs: dict[str, Tensor], autocast: bool = False) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out: Tensor = model(**inputs).loss
            return out

    return loss


def chosen(kind: str, n: int) -> tuple[int, ...]:
    return {
        "all": tuple(range(n)),
        "random": tuple(sorted(random.Random(n).sample(range(n), 5))),
        "deepest": tuple(range(n - 5, n)),
        "lowest": (0,),
    }[kind]


def counted(
    model: PeftModel, live: Iterable[int], *, checkpointing: bool = False, stock: bool = False, autocast: bool = False
) -> int:
    """What autograd holds on the real model, with real weights, once the others are disconnected."""
    names = [adapter.name for adapter in adapters(model)]
    disconnect(model, [name for index, name in enumerate(names) if index not in set(live)])
    if not stock:
        fast_path(model, engine_name="autograd")
    if checkpointing:
        checkpoint_blocks(model.base_model.model)
        end_backward_at_lowest(model)
    return kept_bytes(model, loss_of(model, rows(), autocast))


@cache
def traced(family: str, dtype: str, dropout: float) -> ActivationTrace:
    model = build(family, dtype=dtype, dropout=dropout)
    return trace(model, loss_of(model, rows()))


KEPT_AS = [(dtype, dropout) for dtype in DTYPES for dropout in (0.0, 0.05)]


@pytest.mark.parametrize(("family", "kind", "kept_as", "checkpointing"), pairs(FAMILIES, LIVE, KEPT_AS, [False, True]))
def test_predicted_is_counted(family: str, kind: str, kept_as: tuple[str, float], checkpointing: bool) -> None:
    """One trace of the model with every adapter answers for any set: to the byte."""
    dtype, dropout = kept_as
    found = traced(family, dtype, dropout)
    live = chosen(kind, len(found.adapters))
    model = build(family, dtype=dtype, dropout=dropout)
    assert found.kept(live, checkpointing=checkpointing) == counted(model, live, checkpointing=checkpointing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_set(family: str, seed: int) -> None:
    found = traced(family, "fp32", 0.05)
    draw, n = random.Random(seed), len(found.adapters)
    live = draw.sample(range(n), draw.choice((1, 2, 3)))
    assert found.kept(live) == counted(build(family), live)


@pytest.mark.parametrize("family", a_third(FAMILIES, first=1))
def test_stock_path_and_autocast(family: str) -> None:
    model = build(family, targets=QKV[family])
    inputs, n = rows(), len(adapters(model))
    stock = trace(model, loss_of(model, inputs), stock=True)
    narrow = trace(model, loss_of(model, inputs, autocast=True))
    for live in (range(n), [n - 1]):
        assert stock.kept(live) == counted(build(family, targets=QKV[family]), live, stock=True)
        assert narrow.kept(live) == counted(build(family, targets=QKV[family]), live, autocast=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ranks(family: str) -> None:
    model = build(family)
    found, n = trace(model, loss_of(model, rows())), len(adapters(model))
    wide = lora(family, dropout=0.1, rank=12, targets=ALL_LINEAR[family]).train()
    assert found.kept(range(n), ranks=dict.fromkeys(range(n), 12)) == counted(wide, range(n))


@pytest.mark.parametrize("family", a_third(FAMILIES, first=0))
def test_other_batch_sizes(family: str) -> None:
    """Traced with a prime number of rows: what is a multiple of it comes from the batch."""
    model = build(family)
    found = trace(model, loss_of(model, rows(11)))
    for size in (2, 4, 12):
        exact = trace(model, loss_of(model, rows(size)))
        for live in (found.every, [0], [len(found.adapters) - 1]):
            assert found.at(size, 11).kept(live) == exact.kept(live)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_require_gradients_pull_backward_down(family: str) -> None:
    found, model = traced(family, "fp32", 0.05), build(family)
    last = len(found.adapters) - 1
    base: Any = model.base_model.model
    base.enable_input_require_grads()
    assert found.kept([last], inputs=True) == counted(model, [last])
    assert found.kept([last], inputs=True) > found.kept([last])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_recomputed_block(family: str) -> None:
    """What a checkpointed block keeps while backward goes through it: the block run by itself tells."""
    model, inputs, found = build(family), rows(), traced(family, "fp32", 0.05)
    fast_path(model, engine_name="autograd")
    base: Any = model.base_model.model
    block = (base.bert.encoder.layer if family == "bert" else base.model.layers)[1]
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _m, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (first, *args), kwargs = given[0]
    kwargs.pop("past_key_values", None)
    x = first.detach().requires_grad_()
    kept = kept_bytes(model, lambda: block(x, *args, **kwargs).sum())
    # The block's input is kept anyway.
    assert found.recomputed(found.every) == kept - x.untyped_storage().nbytes()
    assert 0 < found.recomputed([0]) <= found.recomputed(found.every)


def test_nothing_is_drawn_changed_or_left_behind() -> None:
    model = build("deberta")
    checkpoint_blocks(model.base_model.model)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    trace(model, loss_of(model, rows()))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(not layer.lora_variant for layer in model.modules() if "lora_variant" in vars(layer))
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_weights_is_traced_alike() -> None:
    real = build("llama")
    inputs = rows()
    found = trace(real, loss_of(real, inputs))
    real.to("meta")
    assert trace(real, loss_of(real, inputs)).kept(range(5)) == found.kept(range(5))


def test_modules_add_up() -> None:
    found = traced("bert", "fp32", 0.05)
    for options in ({}, {"checkpointing": True}):
        assert sum(found.by_module([3, 9], **options).values()) == found.kept([3, 9], **options)
    assert {name.split(".")[3] for name in found.by_module([8]) if ".layer." in name} == {"1"}


def test_cuda_keeps_a_byte_per_dropped_entry_and_no_probabilities() -> None:
    """By hand, for one block of BERT: what changes from a CPU's kernels to CUDA's."""
    model, inputs = build("bert", targets=QKV["bert"], layers=1), rows()
    cpu, cuda = (trace(model, loss_of(model, inputs), cuda=on) for on in (False, True))
    small = {name: size for name, size in cuda.by_module(range(3)).items() if name.endswith("output.dropout")}
    large = {name: size for name, size in cpu.by_module(range(3)).items() if name.endswith("output.dropout")}
    assert len(small) == 2
    assert {name: 4 * size for name, size in small.items()} == large
    assert cuda.kept(range(3)) < cpu.kept(range(3))


def test_a_forward_that_reads_values_is_refused() -> None:
    model = build("bert")
    with pytest.raises(AdapterError, match="cannot be traced without its weights"):
        trace(model, lambda: model(**rows()).loss * float(next(model.parameters()).sum()))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_of_a_traced_pass_stays_in_memory(family: str) -> None:
    """Neither the graph, in which tanh and softmax hold themselves, nor the model that its hooks know."""
    model = build(family)
    trace(model, loss_of(model, rows()))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None

"""The lean path on plain LoRA: what stock PEFT computes, saves and merges, before, during and after."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import builders
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from weightlora.cost.measure import step_cost
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.adapters import block_of, lora_layers
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest
from weightlora.graft.fast import fast_path, stock_path
from weightlora.graft.forms import Gates
from weightlora.graft.surgery import disconnect
from weightlora.graft.variant import PathVariant

families = pytest.mark.parametrize("family", builders.FAMILIES)


def wrapped(family: str, *, dropout: float = 0.0, **options: object) -> PeftModel:
    """LoRA on every linear layer of a small model in float32, with random B."""
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=_targets(family), **options)
    torch.manual_seed(1)
    model = get_peft_model(builders.base(family, dropout=0.0), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def _targets(family: str) -> str:
    return rf".*\.({'|'.join(builders.ALL_LINEAR[family])})"


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, builders.VOCABULARY, (4, builders.LENGTH), generator=generator)
    ids[:, -1] = 2  # what BART takes for the end of a sentence
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(one: Tensor, other: Tensor, bound: float = 2e-5) -> None:
    assert float((one - other).abs().max()) <= bound * max(1.0, float(other.abs().max()))


@families
def test_same_loss_and_gradients_as_stock(family: str) -> None:
    model = wrapped(family).train()
    loss, grads = step(model)
    n = len(list(lora_layers(model, "default")))
    assert fast_path(model, engine_name="autograd") == n
    fast_loss, fast_grads = step(model)
    close(fast_loss, loss)
    assert fast_grads.keys() == grads.keys()
    for name, grad in grads.items():
        close(fast_grads[name], grad)
    assert stock_path(model) == n
    assert torch.equal(step(model)[0], loss)
    assert stock_path(model) == 0


@families
def test_state_dict_and_saved_files_are_stock(family: str, tmp_path: Path) -> None:
    model = wrapped(family).eval()
    model.save_pretrained(tmp_path / "stock")
    keys = list(model.state_dict())
    fast_path(model, engine_name="autograd")
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fast")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    again = PeftModel.from_pretrained(builders.base(family, dropout=0.0), tmp_path / "fast").eval()
    assert not [v for _, layer in lora_layers(again, "default") for v in layer.lora_variant]
    with torch.no_grad():
        close(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge_are_stock(safe: bool) -> None:
    stock = wrapped("llama").eval()
    fast = copy.deepcopy(stock)
    fast_path(fast, engine_name="autograd")
    for model in (stock, fast):
        model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), fast.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(stock(**batch()).logits, fast(**batch()).logits)
    for model in (stock, fast):
        model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), fast.state_dict().values(), strict=True))
    merged = fast.merge_and_unload()
    with torch.no_grad():
        close(merged(**batch()).logits, stock(**batch()).logits, 1e-4)


def test_disabled_adapters_give_the_base() -> None:
    model = wrapped("bert").eval()
    fast_path(model, engine_name="autograd")
    with torch.no_grad(), model.disable_adapter():
        off = model(**batch()).logits
    with torch.no_grad():
        close(off, builders.base("bert", dropout=0.0).eval()(**batch()).logits)


def test_gates_take_the_place_and_surgery_works() -> None:
    model = wrapped("bert").train()
    loss, _ = step(model)
    fast_path(model, engine_name="autograd")
    gates = Gates(model)
    close(step(model)[0], loss)
    assert gates.omega.grad is not None
    gates.detach()
    n = fast_path(model, engine_name="autograd")
    names = [path for path, _ in lora_layers(model, "default")]
    disconnect(model, names[:-2])
    assert stock_path(model) == 2 < n


def test_gates_are_left_alone() -> None:
    model = wrapped("bert")
    Gates(model)
    assert fast_path(model, engine_name="autograd") == 0
    assert stock_path(model) == 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_lora_is_left_alone(options: dict[str, bool]) -> None:
    model = wrapped("bert", **options)
    assert fast_path(model, engine_name="autograd") == 0
    assert all(layer.cast_input_dtype_enabled for _, layer in lora_layers(model, "default"))


def test_a_second_stock_adapter_still_gets_its_dtype() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)).bfloat16(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    fast_path(model, "default", engine_name="autograd")
    layer = next(layer for _, layer in lora_layers(model, "default"))
    assert isinstance(layer.lora_variant["default"], PathVariant)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    model.base_model.set_adapter(["default", "other"])
    assert model(x).dtype == torch.bfloat16
    fast_path(model, "other", engine_name="autograd")
    assert not layer.cast_input_dtype_enabled
    stock_path(model, "default")
    assert layer.cast_input_dtype_enabled
    assert model(x).dtype == torch.bfloat16


def test_it_keeps_less_for_the_same_operations() -> None:
    model = wrapped("deberta", dropout=0.05).train()
    stock = step_cost(model, lambda: model(**batch()).loss)
    fast_path(model, engine_name="autograd")
    fast = step_cost(model, lambda: model(**batch()).loss)
    assert fast.flops <= stock.flops
    assert fast.kept_activation_bytes < 0.8 * stock.kept_activation_bytes


def test_dropout_only_in_training() -> None:
    model = wrapped("bert", dropout=0.5)
    fast_path(model, engine_name="autograd")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch()).logits, model(**batch()).logits)
        assert not torch.equal(model.train()(**batch()).logits, model(**batch()).logits)


def test_errors_come_before_any_change() -> None:
    model = wrapped("bert")
    with pytest.raises(ConfigError, match="engine 'warp' is unknown"):
        fast_path(model, engine_name="warp")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="adapter 'nope' is unknown"):
        fast_path(model, "nope")
    assert not [v for _, layer in lora_layers(model, "default") for v in layer.lora_variant]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta", "llama"])
def test_nothing_below_the_lowest_survivor_is_kept(family: str, checkpointing: bool) -> None:
    """Outputs of lower blocks die with the forward pass, whoever asks for input gradients before or after the seam."""
    base = builders.base(family, layers=4, dropout=0.0)
    config = LoraConfig(r=2, lora_dropout=0.05, target_modules=_targets(family))
    model = get_peft_model(base, config).train()
    if checkpointing:
        checkpoint_blocks(base, {"use_reentrant": False})
    base.enable_input_require_grads()
    blocks = list((base.model.layers if family == "llama" else base.base_model.encoder.layer).children())
    outputs: list[StorageWeakRef] = []

    def note(_module: nn.Module, _given: object, out: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(StorageWeakRef((out if isinstance(out, Tensor) else out[0]).untyped_storage()))

    def alive() -> list[bool]:
        outputs.clear()
        hooks = [block.register_forward_hook(note) for block in blocks]
        loss = model(**batch()).loss
        for hook in hooks:
            hook.remove()
        gc.collect()
        found = [not ref.expired() for ref in outputs]
        loss.backward()
        return found

    fast_path(model, engine_name="autograd")
    assert all(alive()[:2])
    disconnect(model, [path for path, _ in lora_layers(model, "default") if block_of(path) != 3])
    end_backward_at_lowest(model)
    base.enable_input_require_grads()
    # The third block's output is what the survivors in the fourth read.
    assert alive()[:2] == [False, False]


@pytest.mark.parametrize("asked", [False, True])
@families
def test_checkpointing_draws_the_same_masks_again(family: str, asked: bool) -> None:
    """Non-reentrant, with dropout: every gradient is bit by bit the one without checkpointing."""
    found = []
    for recompute in (False, True):
        model = wrapped(family, dropout=0.3).train()
        if recompute:
            checkpoint_blocks(model.base_model.model, {"use_reentrant": False})
            if asked:
                model.base_model.model.enable_input_require_grads()
        fast_path(model, engine_name="autograd")
        torch.manual_seed(11)
        found.append(step(model))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())

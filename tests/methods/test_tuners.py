"""PEFT's own tuners behind our interface: as PEFT driven by hand, within the budget, saved in PEFT's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from tests.builders import QKV, base, batch, logits, lora, trainer
from torch import nn

from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.tuners import save_own_format, tuner_params
from weightlora.methods import DoRA, Method, VBLoRA, VeRA, method
from weightlora.training import fit

WIDTH, N, R = 16, 6, 4
SHAPES = [(WIDTH, WIDTH)] * N
LORA: dict[str, Any] = {"task_type": "SEQ_CLS", "r": R, "lora_alpha": 8, "lora_dropout": 0.1,
                        "target_modules": list(QKV["bert"])}  # fmt: skip
BY_HAND: dict[str, Any] = {
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "vera": lambda: VeraConfig(task_type="SEQ_CLS", r=8, vera_dropout=0.1, target_modules=list(QKV["bert"])),
    "vb_lora": lambda: VBLoRAConfig(
        task_type="SEQ_CLS", r=2, num_vectors=6, vector_length=8, topk=2, vblora_dropout=0.1,
        target_modules=list(QKV["bert"]),
    ),
}  # fmt: skip
MADE: dict[str, Method] = {"dora": DoRA(), "vera": VeRA(r=8), "vb_lora": VBLoRA(r=2, num_vectors=6, vector_length=8)}
each_method = pytest.mark.parametrize("name", list(MADE))


def wrapped(config: Any) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(base("bert"), config)


def ours(name: str) -> PeftModel:
    return wrapped(MADE[name].peft_config(LoraConfig(**LORA), SHAPES))


@each_method
def test_trains_as_peft_driven_by_hand(name: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", wrapped(BY_HAND[name]()))
    named = [(n, p) for n, p in plain.model.named_parameters() if p.requires_grad]
    # Decay and rates by hand: what the trainer does, and the method's factors on top.
    factors = {"vera": {"vera_lambda": 10.0}, "vb_lora": {"vblora_vector": 10.0, "vblora_logits": 100.0}}.get(name, {})
    decayed = set(plain.get_decay_parameter_names(plain.model))
    groups = [
        {"params": [p], "lr": 1e-2 * factor, "weight_decay": 0.01 * (n in decayed)}
        for n, p in named
        for factor in [next((f for key, f in factors.items() if key in n), 1.0)]
    ]
    plain.optimizer = torch.optim.AdamW(groups)
    plain.train()
    run = trainer(tmp_path / "b", ours(name), optim="adamw_torch")
    result = fit(run, MADE[name])
    assert result.selection is None
    states = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (plain, run)]
    assert states[0].keys() == states[1].keys()
    assert max(float((states[0][n] - states[1][n]).detach().abs().max()) for n in states[0]) == 0.0


@each_method
def test_start_and_count(name: str) -> None:
    model = ours(name)
    start = (logits(model, batch()) - logits(base("bert"), batch())).abs().max()
    assert (float(start) < 1e-5) == (name != "vb_lora")  # the mix of a random bank is not zero
    formula = {
        "dora": N * (R * 2 * WIDTH + WIDTH),
        "vera": N * (8 + WIDTH),
        "vb_lora": 6 * 8 + 6 * N * 2 * 2 * WIDTH // 8,
    }
    assert tuner_params(model)["trainable"] == formula[name]


@each_method
@pytest.mark.parametrize("params", [600, 1234, 5000])
def test_the_budget_is_met_and_used(name: str, params: int) -> None:
    made, rank = MADE[name].within(params, SHAPES, R)
    config = made.peft_config(LoraConfig(**{**LORA, "r": rank}), SHAPES)
    spent = tuner_params(wrapped(config))["trainable"]
    assert spent <= params
    step = {"dora": N * 2 * WIDTH, "vera": N, "vb_lora": 8 + N * 2 * 2 * WIDTH // 8}[name]
    assert params - spent < step or getattr(made, "r", 0) == VeRA.MAX_RANK


@each_method
def test_its_own_format_opens_in_stock_peft(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", ours(name), steps=4)
    fit(run, MADE[name])
    assert save_own_format(run.model, tmp_path / "out", None) <= 1e-4
    again = PeftModel.from_pretrained(base("bert"), tmp_path / "out")
    assert torch.allclose(logits(again, batch()), logits(run.model, batch()), atol=1e-5)


def test_dora_gradient_of_the_magnitude_against_a_dense_reference() -> None:
    model = wrapped(LoraConfig(**{**LORA, "lora_dropout": 0.0}, use_dora=True))
    layer = next(m for m in model.modules() if getattr(m, "lora_magnitude_vector", None))
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    x = torch.randn(5, WIDTH)
    upstream = torch.randn(5, WIDTH)
    m = layer.lora_magnitude_vector["default"].weight
    W = (
        layer.base_layer.weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    dense = m.detach().clone().requires_grad_()
    direction = (W / W.norm(dim=1, keepdim=True)).detach()
    ((x @ (dense[:, None] * direction).T + layer.base_layer.bias) * upstream).sum().backward()
    layer.train()
    (layer(x) * upstream).sum().backward()
    assert torch.allclose(m.grad, dense.grad, atol=1e-4)


def test_vera_redraws_its_projections_from_the_key() -> None:
    first, same, other = (wrapped(VeRA(r=8, key=key).peft_config(LoraConfig(**LORA), SHAPES)) for key in (0, 0, 1))

    def projection(model: nn.Module) -> torch.Tensor:
        return next(b for n, b in model.named_buffers() if "vera_A" in n)

    assert torch.equal(projection(first), projection(same))
    assert not torch.equal(projection(first), projection(other))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: VeRA(r=0), "r=0 is not allowed"),
        (lambda: VBLoRA(num_vectors=1), "num_vectors=1 is less than topk=2"),
        (lambda: VBLoRA(vector_length=7).length(SHAPES), "vector_length=7 must divide .*; use a divisor of 16"),
        (lambda: DoRA().within(10, SHAPES, 8), "10 parameters are too few for dora at rank 1; use at least 288"),
        (lambda: method("vera", rank=3), "vera has no setting 'rank'"),
    ],
)
def test_mistakes_are_named(made: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this method trains VERA adapters, the model has LORA; build it with"):
        fit(trainer(tmp_path, lora()), VeRA())


def test_vera_saved_without_its_projections_is_the_same_by_its_key(tmp_path: Path) -> None:
    config = MADE["vera"].peft_config(LoraConfig(**LORA), SHAPES)
    config.save_projection = False
    model = wrapped(config)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "vera" in n} == {
        "vera_lambda_b", "vera_lambda_d",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda_b" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    loads, saved = (pytest.warns(UserWarning, match=f"Specified to not {what} vera_A") for what in ("load", "save"))
    with loads, saved:
        again = PeftModel.from_pretrained(base("bert"), tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in key or "vera_B" in key]
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), rtol=0, atol=1e-6)


def test_vb_lora_mixes_two_vectors_whose_weights_are_one_and_only_those_learn() -> None:
    model = ours("vb_lora")
    layer = next(m for m in model.modules() if getattr(m, "vblora_logits_A", None))
    others = [p for n, p in model.named_parameters() if "vblora_logits" in n]
    (bank,) = (p for n, p in model.named_parameters() if "vector_bank" in n)
    chosen: set[int] = set()
    for logits_ in others:
        weights, indices = logits_.detach().topk(2, dim=-1)
        torch.testing.assert_close(torch.softmax(weights, -1).sum(-1), torch.ones(logits_.shape[:-1]))
        chosen |= set(indices.flatten().tolist())
    A, B = layer._get_lora_matrices("default")
    own = layer.vblora_logits_A["default"].detach()
    weights, indices = own.topk(2, dim=-1)
    mixed = (torch.softmax(weights, -1).unsqueeze(-1) * bank.detach()[indices]).sum(-2)
    torch.testing.assert_close(A.detach(), mixed.reshape(A.shape))
    with torch.no_grad():
        for logits_ in others:  # vector 5 is nobody's choice
            logits_[..., 5] = -9.0
    model(**batch()).loss.backward()
    moved = bank.grad.abs().sum(1) > 0
    assert not moved[5]
    assert int(moved.sum()) == 5
    assert B.shape == (WIDTH, 2)


def test_dora_merged_is_dora() -> None:
    model = wrapped(LoraConfig(**LORA, use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "lora_magnitude" in name:
                parameter.mul_(1.5)
    live = logits(model, batch())
    assert not torch.allclose(live, logits(base("bert"), batch()), atol=1e-2)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch()), live, rtol=1e-4, atol=1e-4)

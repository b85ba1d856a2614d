"""Training takes the lean adapter path by default: in which phases, how near to PEFT's own forward, and no longer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import FAMILIES, adapter_state, batch, batches, lora, max_difference, trainer, warm
from torch import Tensor, nn
from transformers import TrainerCallback

from weightlora import ops
from weightlora.graft.adapters import lora_layers
from weightlora.graft.fast import fast_path
from weightlora.graft.variant import FormVariant, PathVariant
from weightlora.methods import LoRA, Method, RandomAdapters, WeightLoRA, WeightLoRAPlus
from weightlora.training import attach, fit

# Float32 after twelve steps of plain SGD (which, unlike Adam, does not blow a rounding error up to a whole step): the
# largest difference between weights of about one.
FP32 = 1e-5


class Variants(TrainerCallback):
    """Notes what computes the adapters in every step: PEFT (None), the lean path, gates; and by which engine."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, set[tuple[Any, Any]]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        variants = [layer.lora_variant.get("default") for _, layer in lora_layers(self.model, "default")]
        self.seen[state.global_step + 1] = {(type(v), getattr(v, "path", None)) for v in variants}


LEAN = {(PathVariant, ops.ENGINES["autograd"])}
GATED = {(FormVariant, ops.ENGINES["autograd"])}
STOCK = {(type(None), None)}


def watched(made: Method, out: Path, path: Any = "autograd", **options: Any) -> dict[int, set[tuple[Any, Any]]]:
    each = trainer(out, lora(), save_strategy="steps", save_steps=2)
    spy = Variants(each.model)
    each.add_callback(spy)
    fit(each, made, engine=path, measure=False, **options)
    assert {type(layer.lora_variant.get("default")) for _, layer in lora_layers(each.model, "default")} == {type(None)}
    return spy.seen


@pytest.mark.parametrize(
    ("made", "before", "after"),
    [
        (LoRA(), LEAN, LEAN),
        (RandomAdapters(k=2), LEAN, LEAN),
        (WeightLoRA(k=2, select_after=5), LEAN, LEAN),
        (WeightLoRA(k=2, select_after=5, score="omega", gate_lr=5.0), GATED, LEAN),
        (WeightLoRAPlus(k=2, select_after=5), LEAN, LEAN),
    ],
    ids=["lora", "random", "credit", "omega", "grown"],
)
def test_every_ungated_step_takes_it(made: Method, before: Any, after: Any, tmp_path: Path) -> None:
    seen = watched(made, tmp_path)
    assert seen == {step: before if step <= 5 else after for step in range(1, 13)}


def test_also_after_resuming_from_beyond_the_seam(tmp_path: Path) -> None:
    made = WeightLoRAPlus(k=2, select_after=5)
    watched(made, tmp_path)
    for step in (10, 12):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path.parent / f"{tmp_path.name}-kept-{step}")
    assert watched(made, tmp_path, resume=True) == dict.fromkeys(range(9, 13), LEAN)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert watched(RandomAdapters(k=2), tmp_path, "stock") == dict.fromkeys(range(1, 13), STOCK)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", [LoRA(), RandomAdapters(k=2)], ids=lambda m: m.name)
def test_it_is_stock_training_to_within_rounding(family: str, made: Method, tmp_path: Path) -> None:
    states = []
    for path in ("stock", "auto"):
        each = trainer(tmp_path / path, warm(lora(family, dropout=0.0), 0.2), optim="sgd", learning_rate=0.05)
        fit(each, made, engine=path, measure=False)  # type: ignore[arg-type]
        states.append(adapter_state(each.model))
    assert max_difference(*states) <= FP32
    untrained = adapter_state(warm(lora(family, dropout=0.0), 0.2))
    assert max_difference({key: untrained[key] for key in states[0]}, states[0]) > 100 * FP32  # something was learnt


def test_a_loop_of_ones_own_takes_it_and_ends_with_stock_layers() -> None:
    model = lora()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = attach(model, RandomAdapters(k=2), optimizer)
    kinds = {type(layer.lora_variant["default"]) for _, layer in lora_layers(model, "default")}
    assert kinds == {PathVariant}
    for inputs, _ in zip(batches(), range(2), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    tuner.finish()
    assert not any(layer.lora_variant for _, layer in lora_layers(model, "default"))


DRAWS = 400


def draws(model: nn.Module, of: Callable[[nn.Module], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([of(model) for _ in range(DRAWS)]).double()


def test_dropout_has_the_same_statistics_as_pefts() -> None:
    """Another random stream, so mean and spread over many draws are compared: of the outputs and of every gradient."""
    model = warm(lora(dropout=0.0, lora_dropout=0.2)).train()
    inputs = batch(2)

    def sample(one: nn.Module) -> Tensor:
        one.zero_grad()
        out = one(**inputs)
        out.loss.backward()
        grads = [p.grad.flatten() for n, p in one.named_parameters() if "lora_" in n and p.grad is not None]
        return torch.cat([out.logits.detach().flatten(), *grads])

    lean = copy.deepcopy(model)
    fast_path(lean)
    theirs, ours = draws(model, sample), draws(lean, sample)
    moving = theirs.std(0) > 1e-8
    assert moving.float().mean() > 0.9
    theirs, ours = theirs[:, moving], ours[:, moving]
    spread = ((theirs.var(0) + ours.var(0)) / DRAWS).sqrt()
    z = (theirs.mean(0) - ours.mean(0)) / spread
    assert float(z.abs().max()) < 5.5  # of about a thousand numbers
    # The variance of a sample's variance needs the fourth moment, estimated from both samples together.
    both = torch.cat([theirs - theirs.mean(0), ours - ours.mean(0)])
    variance = both.square().mean(0)
    noise = ((both.pow(4).mean(0) - variance.square()) * 2 / DRAWS).sqrt()
    assert float(((theirs.var(0) - ours.var(0)) / noise).abs().max()) < 5.5
    # The comparison can tell: a tenth more dropout would show in the spread.
    assert math.isclose(float((ours.var(0) / theirs.var(0)).median()), 1.0, abs_tol=0.08)

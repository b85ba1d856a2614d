"""Optimizers of one's own, through the seam and a resume: the stock trainer and the unbroken run are the truth."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from tests.builders import adapter_state, batch, lora, max_difference, trainer
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RMSprop
from transformers import Adafactor, Trainer

from weightlora import attach
from weightlora.errors import CheckpointError, ConfigError
from weightlora.methods import Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import fit
from weightlora.training.checkpoint import folders, seal

ONE = WeightLoRA(k=1, select_after=3)
GROWN = WeightLoRAPlus(k=2, select_after=3)
GONE_ON = ("checkpoint-2", "seam-3", "checkpoint-4")


def named(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def by_block(model: Any) -> list[dict[str, Any]]:
    """A group for each block, with a rate of its own, then one for the head."""
    blocks: dict[str, list[Any]] = {}
    for name, p in named(model):
        blocks.setdefault(name.split("layer.")[1][0] if "layer." in name else "head", []).append(p)
    return [{"params": ps, "lr": 1e-2 / (2 + i)} for i, (_, ps) in enumerate(sorted(blocks.items()))]


def plain(model: Any) -> list[Any]:
    return [p for _, p in named(model)]


MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "one group": lambda model: AdamW(plain(model), lr=1e-2),
    "by block": lambda model: AdamW(by_block(model), lr=1e-2),
    "by block, fused": lambda model: AdamW(by_block(model), lr=1e-2, fused=True),
    "with names": lambda model: AdamW(named(model), lr=1e-2),
    "backwards": lambda model: AdamW(plain(model)[::-1], lr=1e-2),
    "sgd": lambda model: SGD(by_block(model), lr=1e-1, momentum=0.9),
    "rmsprop": lambda model: RMSprop(by_block(model), lr=1e-3),
    "adagrad": lambda model: Adagrad(by_block(model), lr=1e-2),
    "nadam": lambda model: NAdam(by_block(model), lr=1e-2),
    "adafactor": lambda model: Adafactor(by_block(model), lr=1e-2, relative_step=False, scale_parameter=False),
}


def made(out: Path, make: Callable[[Any], Optimizer], *, by_trainer: bool = False) -> Any:
    """A trainer with that optimizer, given to it or made by it."""

    class Making(Trainer):
        def create_optimizer(self, *given: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = make(self.model)
            return self.optimizer

    model = lora()
    settings: Any = {"steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 6}
    if by_trainer:
        return trainer(out, model, cls=Making, **settings)
    return trainer(out, model, optimizers=(make(model), None), **settings)


@pytest.mark.parametrize(("name", "by_trainer"), [("by block", True), ("with names", False), ("backwards", True)])
def test_nothing_cut_is_stock_training(name: str, by_trainer: bool, tmp_path: Path) -> None:
    stock = made(tmp_path / "a", MAKE[name], by_trainer=by_trainer)
    stock.train()
    ours = made(tmp_path / "b", MAKE[name], by_trainer=by_trainer)
    fit(ours, WeightLoRA(k=1.0, select_after=3), engine="stock", measure=False)
    assert max_difference(adapter_state(ours.model), adapter_state(stock.model)) == 0.0


@pytest.mark.parametrize(
    ("name", "method", "by_trainer"),
    [
        ("one group", GROWN, False),
        ("by block", GROWN, False),
        ("by block", ONE, False),
        ("by block", ONE, True),
        ("with names", GROWN, False),
        ("backwards", GROWN, True),
    ],
)
def test_resumed_before_and_after_the_seam(name: str, method: Method, by_trainer: bool, tmp_path: Path) -> None:
    """Blocks have lost all adapters: their groups stay, empty, with their rates, and schedules count them."""
    done = made(tmp_path / "whole", MAKE[name], by_trainer=by_trainer)
    result = fit(done, method, measure=False)
    groups: Any = done.optimizer.param_groups
    assert len(groups) == (3 if name == "by block" else 1)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for _, p in named(done.model)}
    for each in GONE_ON:
        shutil.copytree(tmp_path / "whole" / each, tmp_path / each / each)
        again = made(tmp_path / each, MAKE[name], by_trainer=by_trainer)
        resumed = fit(again, method, resume=True, measure=False)
        assert resumed.selection == result.selection
        assert max_difference(adapter_state(again.model), adapter_state(done.model)) == 0.0


@pytest.mark.parametrize("name", ["by block, fused", "sgd", "rmsprop", "adagrad", "nadam", "adafactor"])
def test_other_optimizers_with_empty_groups(name: str, tmp_path: Path) -> None:
    done = made(tmp_path, MAKE[name])
    fit(done, ONE, measure=False)
    assert [len(group["params"]) for group in done.optimizer.param_groups].count(0) == 1
    for later in folders(tmp_path):
        if later.name not in GONE_ON:
            shutil.rmtree(later)
    again = made(tmp_path, MAKE[name])
    fit(again, ONE, resume=True, measure=False)
    assert max_difference(adapter_state(again.model), adapter_state(done.model)) == 0.0


def test_other_groups_than_the_runs_are_refused(tmp_path: Path) -> None:
    """States are loaded by place: they would go to other parameters, or end in torch's own words."""
    fit(made(tmp_path, MAKE["by block"]), ONE, measure=False)
    for each in GONE_ON:
        with pytest.raises(CheckpointError, match=r"groups are not those of the checkpoint: 1 groups here, 3 there"):
            fit(made(tmp_path / each, MAKE["one group"]), ONE, resume=tmp_path / each, measure=False)

    def turned(model: Any) -> Optimizer:
        return AdamW(by_block(model)[::-1], lr=1e-2)

    with pytest.raises(CheckpointError, match="is not in the same group; resume with an optimizer that is made as"):
        fit(made(tmp_path / "b", turned), ONE, resume=tmp_path / "seam-3", measure=False)


@pytest.mark.parametrize("groups", [None, [3]])
def test_a_checkpoint_that_says_no_order(groups: Any, tmp_path: Path) -> None:
    fit(made(tmp_path, MAKE["one group"]), ONE, measure=False)
    file = tmp_path / "seam-3" / "weightlora.json"
    manifest = json.loads(file.read_text())
    manifest["data"]["optimizer"] = groups
    file.write_text(json.dumps(manifest))
    seal(tmp_path / "seam-3")
    with pytest.raises(CheckpointError, match=rf"the manifest is damaged: {re.escape(repr(groups))} are no optimizer"):
        fit(made(tmp_path / "d", MAKE["one group"]), ONE, resume=tmp_path / "seam-3", measure=False)


def lorafa(model: Any) -> Optimizer:
    found: Optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    return found


@pytest.mark.parametrize("by_trainer", [True, False])
def test_lists_beside_parameters_are_refused_before_the_first_step(by_trainer: bool, tmp_path: Path) -> None:
    """LoRA-FA's keeps names and scales there, which would be left behind."""
    each = made(tmp_path, lorafa, by_trainer=by_trainer)
    with pytest.raises(ConfigError, match="LoraFAOptimizer keeps a list 'names' beside its parameters") as caught:
        fit(each, ONE, measure=False)
    assert "\n" not in str(caught.value)
    assert each.state.global_step == 0
    assert not folders(tmp_path)


def test_attach_carries_names_and_refuses_other_lists() -> None:
    model, other = lora(), lora()
    with pytest.raises(ConfigError, match="keeps a list 'names'"):
        attach(other, ONE, lorafa(other))
    optimizer = AdamW(named(model), lr=1e-2)
    tuner = attach(model, GROWN, optimizer)
    for step in range(5):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    group = optimizer.param_groups[0]
    live = dict(model.named_parameters())
    assert len(group["params"]) == len(group["param_names"])
    assert all(live[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert torch.isfinite(group["params"][0]).all()

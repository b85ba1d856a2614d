"""From the words for targets to layers and stacks of experts, on models without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tests.families import FAMILIES

from weightlora.errors import AdapterError, ConfigError, PlanError
from weightlora.graft.adapters import adapters
from weightlora.runs.plan import planner_for
from weightlora.runs.targets import placed, rank_numbers, targets
from weightlora.tasks.skeletons import Skeleton, skeleton


def bones(title: str, where: Path) -> Skeleton:
    return skeleton(str(FAMILIES[title].folder(where)))


def kinds(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def test_words_of_a_mixture(tmp_path: Path) -> None:
    model = bones("gpt-oss, with experts", tmp_path)
    assert kinds(targets("all-linear", model)) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    both = targets("q_proj, experts", model)
    assert kinds(both) == ["q_proj", "gate_up_proj", "down_proj"]
    found = placed(both, model, 0.0)
    assert len(found["target_modules"]) == 2
    assert len(found["target_parameters"]) == 4
    with pytest.raises(ConfigError, match=r"adapters on experts \(model.layers.0.* have no dropout; use --dropout 0"):
        placed(both, model, 0.05)
    with pytest.raises(AdapterError, match="targets 'vision' matches nothing in this model; use all-linear"):
        targets("vision", model)
    with pytest.raises(AdapterError, match="no linear layer ends in 'gate_up_proj'; use all-linear, attention, or end"):
        targets("gate_up_proj", model)
    numbers = {name: sum(rank_numbers(model.model, name)) for name in both}
    live = adapters(get_peft_model(model.model, LoraConfig(r=3, **found)))
    assert {a.name: a.rows * (a.d_in + a.d_out) // 3 for a in live} == numbers


def test_words_of_a_model_that_sees(tmp_path: Path) -> None:
    model = bones("Qwen2.5-VL, both towers", tmp_path)
    assert all("language_model" in name for name in targets("all-linear", model))
    assert all(".visual." in name for name in targets("vision", model))
    assert kinds(targets("vision, attention", model))[-3:] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(
        PlanError, match=r"12 adapters compute nothing on the text that a plan is made for \(model.visual"
    ):
        planner_for(FAMILIES["Qwen2.5-VL, both towers"].plan(tmp_path))

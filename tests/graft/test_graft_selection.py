"""A selection as data: JSON and back, the same placement in stock PEFT, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests.builders import FAMILIES, adapter_state, base, lora

from weightlora.errors import CheckpointError
from weightlora.graft.adapters import adapters
from weightlora.graft.selection import Choice, Selection, select
from weightlora.graft.surgery import disconnect, grow_adapters

numbers = st.floats(allow_nan=False, allow_infinity=False)
choices = st.builds(
    Choice,
    name=st.text(min_size=1, max_size=30),
    kept=st.booleans(),
    omega=numbers,
    score=st.none() | numbers,
    rank=st.integers(1, 512),
    scale=numbers,
)
selections = st.builds(
    Selection,
    method=st.sampled_from(["weightlora", "random"]),
    preset=st.sampled_from(["recommended", "paper"]),
    step=st.none() | st.integers(0, 10**6),
    why=st.text(max_size=60),
    choices=st.lists(choices, max_size=6).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(selections)
def test_json_round_trip(selection: Selection) -> None:
    text = selection.to_json()
    assert Selection.from_json(text) == selection
    assert Selection.from_json(text).to_json() == text
    assert (selection.k, selection.n) == (sum(c.kept for c in selection.choices), len(selection.choices))


@settings(max_examples=10, deadline=None)
@given(selections)
def test_file_round_trip(tmp_path_factory: pytest.TempPathFactory, selection: Selection) -> None:
    path = tmp_path_factory.mktemp("selection") / "deep" / "selection.json"
    assert Selection.load(selection.save(path)) == selection
    assert [p.name for p in path.parent.iterdir()] == ["selection.json"]


def chosen(family: str, ranks: dict[int, int], **config: Any) -> tuple[Any, Selection]:
    """A model after surgery (adapter index -> rank), and the selection that says so."""
    model = lora(family, **config)
    live = adapters(model)
    selection = select(
        live, list(ranks), omegas=[1.0] * len(live), scores=None, method="test", preset="paper", step=3, why="by hand"
    )
    disconnect(model, [a.name for a in live if a.index not in ranks])
    grow_adapters(model, {live[i].name: r for i, r in ranks.items()}, generator=torch.Generator())
    return model, selection.with_ranks(adapters(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        ({0: 4, 3: 4, 5: 4}, {}),
        ({1: 6, 2: 8, 4: 6}, {}),
        ({5: 7}, {"lora_alpha": 3}),
        ({0: 4, 1: 5, 5: 6}, {"use_rslora": True}),
    ],
)
def test_lora_config_builds_the_same_in_stock_peft(family: str, ranks: dict[int, int], config: dict[str, Any]) -> None:
    model, selection = chosen(family, ranks, **config)
    assert [c.rank for c in selection.kept] == list(ranks.values())
    settings_ = selection.lora_config(task_type="SEQ_CLS", lora_dropout=0.1)
    assert settings_.target_modules == list(selection.names)
    stock = get_peft_model(base(family), settings_)
    here, there = adapters(model), adapters(stock)
    assert [(a.name, a.rank, a.shape) for a in there] == [(a.name, a.rank, a.shape) for a in here]
    assert [a.scale for a in there] == pytest.approx([a.scale for a in here], rel=1e-12)
    shapes = [{k: v.shape for k, v in adapter_state(m).items()} for m in (model, stock)]
    assert shapes[0] == shapes[1]


def test_lora_config_is_plain_where_it_can_be() -> None:
    _, selection = chosen("bert", {0: 4, 3: 4})
    config = selection.lora_config(r=16, bias="none")
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (16, 8, {}, {})


def test_lora_config_of_nothing() -> None:
    empty = Selection(method="m", preset="p", step=0, why="", choices=())
    with pytest.raises(CheckpointError, match="the selection keeps no adapter, so there is no LoraConfig"):
        empty.lora_config()


def good() -> dict[str, Any]:
    return chosen("bert", {0: 4})[1].to_dict()


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in good().items() if k != key}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the selection is not JSON"),
        ("[1]", "a selection must be a JSON object, not list"),
        (json.dumps({**good(), "schema_version": 99}), "selection schema 99 is not supported; this release reads 1"),
        (json.dumps(without("method")), "the selection is damaged: it has no key 'method'"),
        (json.dumps({**good(), "choices": [{"name": "a"}]}), "it has no key 'choices.0..kept'"),
        (json.dumps({**good(), "choices": 7}), "the selection is damaged"),
        (json.dumps({**good(), "choices": [{**good()["choices"][0], "rank": 0}]}), "rank must be 1 or more"),
        (json.dumps({**good(), "placement": {"micro_batch": 0}}), "its micro_batch is 0"),
        (json.dumps({**good(), "placement": {"micro_batch": False}}), "its micro_batch is False"),
        (json.dumps({**good(), "placement": {"micro_batch": 2.0}}), "its micro_batch is 2.0"),
    ],
)
def test_damaged_selections(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "selection.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Selection.load(path)


def test_missing_selection(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read the selection .*gone.json: No such file or directory"):
        Selection.load(tmp_path / "gone.json")

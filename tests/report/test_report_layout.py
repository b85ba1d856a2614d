"""Every adapter gets a place of its own and a name that people can read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.report.layout import Grid, layout
from weightlora.runs.record import AdapterScore, Record


def adapter(name: str, block: int | None, kind: str) -> AdapterScore:
    return AdapterScore(name=name, block=block, kind=kind, omega=1.0, score=None, kept=True)


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ("bert", ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
        ("deberta", ["query_proj", "key_proj", "value_proj"]),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("holes", ["query", "value", "dense"]),
    ],
)
def test_kinds_are_short_and_in_module_order(make: Callable[..., Record], shape: str, kinds: list[str]) -> None:
    places = layout(make(shape).adapters)
    assert list(dict.fromkeys(place.kind for place in places)) == kinds
    assert {place.tower for place in places} == {""}


@pytest.mark.parametrize("full_kinds", [True, False])
def test_encoder_and_decoder_are_apart(make: Callable[..., Record], full_kinds: bool) -> None:
    """Also when a decoder layer has two kinds of one name: its own q_proj and the one that looks at the encoder."""
    adapters = [
        adapter(a.name, a.block, a.kind if full_kinds else a.kind.split(".")[-1]) for a in make("bart").adapters
    ]
    places = layout(adapters)
    assert len({(place.tower, place.block, place.kind) for place in places}) == len(adapters) == 96
    assert list(dict.fromkeys(place.tower for place in places)) == ["encoder", "decoder"]
    short = {place.adapter.name: place.short for place in places}
    assert short["base_model.model.model.encoder.layers.3.self_attn.q_proj"] == "encoder.3.q_proj"
    assert short["base_model.model.model.decoder.layers.3.encoder_attn.q_proj"] == "decoder.3.encoder_attn.q_proj"


def test_the_first_number_is_not_always_the_layer() -> None:
    """Layer 1 of stage 0 is not layer 1 of stage 1."""
    names = [f"swin.stages.{stage}.blocks.{block}.attn.qkv" for stage in (0, 1) for block in (2, 3)]
    places = layout([adapter(name, int(name.split(".")[4]), "attn.qkv") for name in names])
    assert len({(place.tower, place.block, place.kind) for place in places}) == 4
    assert {place.tower for place in places} == {"0", "1"}


def test_nested_towers_keep_enough_of_their_names() -> None:
    names = ["m.vision.a.layers.0.q", "m.vision.b.layers.0.q", "m.text.layers.0.q"]
    assert [p.tower for p in layout([adapter(n, 0, "q") for n in names])] == [
        "vision.a.layers",
        "vision.b.layers",
        "text.layers",
    ]


def test_adapters_outside_the_towers() -> None:
    places = layout([adapter("e.l.0.q", 0, "q"), adapter("d.l.0.q", 0, "q"), adapter("score.dense", None, "dense")])
    assert [place.short for place in places] == ["e.0.q", "d.0.q", "other.dense"]


def test_no_adapters_no_places() -> None:
    assert layout([]) == ()


segment = st.sampled_from(["a", "b", "0", "1", "q", "k"])


@given(st.lists(st.lists(segment, min_size=1, max_size=6).map(".".join), unique=True, max_size=12), st.data())
def test_no_two_adapters_ever_share_a_place(names: list[str], data: st.DataObject) -> None:
    """Whatever block and kind the names were given."""
    blocks = [data.draw(st.sampled_from([0, 1, None])) for _ in names]
    adapters = [adapter(name, block, name.split(".")[-1]) for name, block in zip(names, blocks, strict=True)]
    places = layout(adapters)
    assert [place.adapter for place in places] == adapters
    assert len({(place.tower, place.block, place.kind) for place in places}) == len(names)


def test_a_block_that_is_said_to_be_the_billionth_takes_one_row() -> None:
    scores = [adapter(f"layer.{block}.q", block, "q") for block in (3, 2**31, 2**62)]
    assert Grid.of(layout(scores)).rows == {3: 0.0, 2**31: 1.0, 2**62: 2.0}
    assert Grid.of(layout(scores[:1])).rows == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}

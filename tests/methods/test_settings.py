"""A preset's values hold wherever it is named and what differs says so; settings have the types they declare."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.builders import lora

import weightlora as wl
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters
from weightlora.methods import METHODS, AdapterMethod, method
from weightlora.methods.base import PRESETS
from weightlora.methods.weightlora.worth import Credit

CASES = [(name, preset) for name in METHODS for preset in PRESETS]


def by_source(name: str, preset: str) -> dict[str, Any]:
    """What the class says by default, and over it what the preset's table says."""
    kind = METHODS[name]
    return {f.name: f.default for f in fields(kind)} | dict(kind.presets.get(preset, {})) | {"preset": preset}


@pytest.mark.parametrize(("name", "preset"), CASES, ids=["-".join(case) for case in CASES])
def test_a_presets_values_hold_wherever_it_is_named(name: str, preset: str) -> None:
    kind: Any = METHODS[name]
    want = by_source(name, preset)
    if want.get("k", 0) is None and preset != "recommended":
        want["k"] = 0.25
    for made in (kind(preset=preset), kind.from_preset(preset), method(name, preset)):
        assert {f.name: getattr(made, f.name) for f in fields(made)} == want
        assert made.label == preset


def another(value: Any, name: str) -> Any:
    """Some other allowed value of a setting."""
    if isinstance(value, bool):
        return not value
    words = {"score": "trapezoid", "rule": "signed", "k_schedule": "cubic", "init_A": "official", "growth": "qr",
             "noise": "uniform", "remainder": "top", "scoring": "exact", "variant": "tl5"}  # fmt: skip
    if isinstance(value, str):
        return words[name]
    return 0.125 if isinstance(value, float) else (value or 0) + 3


CHANGES = [
    (name, preset, f.name)
    for name, preset in CASES
    for f in fields(METHODS[name])
    if f.name not in ("preset", "memory", "step_time", "ranks")
]


@pytest.mark.parametrize(("name", "preset"), CASES, ids=["-".join(case) for case in CASES])
def test_what_is_given_wins_and_the_label_says_so(name: str, preset: str) -> None:
    kind: Any = METHODS[name]
    own = kind.presets.get(preset, {})
    for setting in [s for n, p, s in CHANGES if (n, p) == (name, preset)]:
        value = another(by_source(name, preset)[setting], setting)
        if value == by_source(name, preset)[setting]:
            continue
        try:
            made = kind(preset=preset, **{setting: value})
        except ConfigError:
            continue  # a value that needs another setting changed too
        assert getattr(made, setting) == value
        free = setting in ("k", "spend", "seed") and setting not in own
        assert made.label == (preset if free else f"{preset}, changed: {setting}")


def test_the_readers_of_a_label() -> None:
    made = wl.WeightLoRA(k=2, preset="paper", score="credit", select_after=3)
    assert made.gate_lr == 5.0
    assert made.label == "paper, changed: select_after, score"
    live = adapters(lora())
    assert made.choose(live, [0, 1], "so", step=3).preset == made.label
    assert wl.methods.RandomAdapters(k=1, seed=4).label == "recommended"
    assert wl.WeightLoRA(memory="1GiB").label == "recommended"


def test_copies_keep_what_was_given() -> None:
    made = wl.WeightLoRA(k=2, preset="paper", score="credit")
    assert replace(made, k=3) == wl.WeightLoRA(k=3, preset="paper", score="credit")
    assert copy.deepcopy(made) == made


class Mine(AdapterMethod):
    """A method of a user's own, without a dataclass of its own."""

    name = "mine"

    def begin(self, adapters: Any, max_steps: int) -> Any:
        raise NotImplementedError


def test_a_method_of_ones_own_has_the_same_border() -> None:
    assert Mine(preset="paper").label == "paper"
    with pytest.raises(ConfigError, match="preset='papre' is unknown"):
        Mine(preset="papre")


LIKE: dict[type, list[Any]] = {  # values of other libraries, by what they become
    int: [np.int64(3), np.uint8(3), np.int32(3)],
    float: [np.float64(0.5), np.float32(0.5), Fraction(1, 2)],
}
WRONG: list[Any] = ["5", b"5", True, 1j, Decimal(1), [1], {"a": 1}, object(), torch.tensor(3), np.array([1]), None]


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_takes_its_type_and_refuses_others(name: str) -> None:
    """Numbers of NumPy become Python's; anything else is a ConfigError that names the setting."""
    kind: Any = METHODS[name]
    for f in (f for f in fields(kind) if f.name in {*kind.settings(), "preset"}):
        declared = f"| {f.type} |"
        for want, values in LIKE.items():
            for value in values if f"| {want.__name__} |" in declared else []:
                try:
                    made = kind(**{f.name: value})
                except ConfigError as error:
                    assert f.name in str(error) or want is float  # noqa: PT017 - out of its range
                    continue
                assert type(getattr(made, f.name)) is want
        for value in WRONG:
            allowed = {"True": "bool", "None": "None", "'5'": "str", "[1]": "tuple"}.get(repr(value))
            if allowed and allowed in str(f.type):
                continue
            if f.type in ("Score", "Rule", "Shape", "Growth", "Noise", "Remainder", "Scoring") and value == "5":
                continue
            with pytest.raises(ConfigError, match=f.name):
                kind(**{f.name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wl.WeightLoRA(10), "takes settings by name, not 10 alone; they are adapter_rate"),  # type: ignore[misc]
        (lambda: wl.WeightLoRA(kk=10), "has no setting 'kk'; it has adapter_rate"),  # type: ignore[call-arg]
        (lambda: wl.WeightLoRA(gate_lr="5"), "gate_lr='5' is not allowed; use a number"),  # type: ignore[arg-type]
        (lambda: wl.WeightLoRA(k="10"), "k='10' is not allowed; use a number or None"),  # type: ignore[arg-type]
        (lambda: wl.WeightLoRA(select_after=1.0), "select_after=1.0 may mean one step or the whole run"),
        (lambda: wl.AdaLoRA(tinit=1.0), "tinit=1.0 may mean one step"),
        (lambda: wl.WeightLoRA(select_after=0), "select_after=0 is not allowed; use a number of steps"),
        (lambda: wl.WeightLoRAPlus(max_rank=8.0), "max_rank=8.0 is not allowed; use a whole number or None"),  # type: ignore[arg-type]
        (lambda: wl.FlexLoRA(ranks=[1, 2, "3", 4]), "ranks=.* is not allowed; use a list of whole numbers or None"),  # type: ignore[arg-type]
        (lambda: wl.WeightLoRA(preset=None), "preset=None is not allowed; use text"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_one_line_says_what_is_allowed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_lists_are_ranks_too() -> None:
    assert wl.FlexLoRA(clients=2, ranks=[np.int64(1), 2]).ranks == (1, 2)  # type: ignore[arg-type]


def test_coverage_counts_the_blocks_of_each_stack() -> None:
    """The set of K with the largest sum of roots, tried out over all sets, with every block where it is."""
    live = adapters(lora("bart", 2))
    policy = wl.WeightLoRA(k=4, select_after=3, coverage=True).begin(live, 10)
    assert isinstance(policy.worth, Credit)
    policy.worth.credits = torch.rand(len(live), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    policy.worth.credits[:6] += 0.3  # the encoder earned more
    worth, where = policy.worth.credits.tolist(), [a.name.split("coder.")[0] + str(a.block) for a in live]

    def value(kept: tuple[int, ...]) -> float:
        return sum(math.sqrt(sum(worth[i] for i in kept if where[i] == block)) for block in set(where))

    best = max(itertools.combinations(range(len(live)), 4), key=value)
    chosen = policy.decide([1.0] * len(live)).selection
    assert tuple(i for i, c in enumerate(chosen.choices) if c.kept) == best
    assert len({where[i] for i in best}) == 4


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_as_text_or_paths(kind: Any, tmp_path: Path) -> None:
    chosen = wl.methods.RandomAdapters(k=1).choose(adapters(lora()), [0], "so", step=0)
    chosen.save(kind(tmp_path / "selection.json"))
    assert wl.Selection.load(kind(tmp_path / "selection.json")) == chosen
    assert wl.export(lora(), kind(tmp_path / "out")).path == tmp_path / "out"


@pytest.mark.parametrize(
    "call",
    [
        lambda out: wl.export(3, out),
        lambda out: wl.export("model", out),
        lambda out: wl.export(lora(), 3),
        lambda out: wl.export(lora(), None),
        lambda out: wl.export(lora(), out, 3),
        lambda out: wl.export(lora(), out, None),
        lambda out: wl.export(lora(), out, adapter=3),
        lambda out: wl.export(lora(), out, base="folder", profile="merged"),
        lambda out: wl.export(lora(), out, sample=[1, 2]),
        lambda out: wl.Selection.load(3),
        lambda out: wl.Selection.from_json(3),
        lambda out: wl.Selection.from_dict([]),
        lambda out: method(3),
        lambda out: method("random", 3),
    ],
)
def test_exports_and_selections_say_it_in_one_line(call: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(wl.WeightLoRAError):
        call(tmp_path / "out")
    assert not list(tmp_path.iterdir())

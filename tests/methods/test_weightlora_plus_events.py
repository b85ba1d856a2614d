"""The authors' WeightLoRA+ removes adapters at two events: what the first one drops is out for good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.test_methods_battery import Loop

from weightlora.errors import ConfigError
from weightlora.methods import GrowthPlan, WeightLoRAPlus

EVENTS = {"k": 2, "select_after": 6, "project_every": 3}  # n = 6, then 3, then 2


def gates(made: WeightLoRAPlus) -> list[list[float]]:
    """Omega after each step of warm-up."""
    seen: list[list[float]] = []
    loop = Loop.start(made)
    loop.run(5, lambda step: seen.append(list(loop.tuner.omegas.values())))
    return seen


def test_what_the_first_event_drops_stays_out() -> None:
    official = WeightLoRAPlus(preset="official", **EVENTS)
    assert official.comeback is False
    seen = gates(official)
    dropped = [i for i, omega in enumerate(seen[2]) if omega == 0]
    assert len(dropped) == 3
    assert all(seen[step][i] == 0 for step in (3, 4) for i in dropped)
    loop = Loop.start(official).run(6)
    assert loop.tuner.selection is not None
    names = list(loop.tuner.omegas)
    assert loop.tuner.selection.k == 2
    assert not {names[i] for i in dropped} & set(loop.tuner.selection.names)


def test_by_the_papers_rule_a_gate_may_rise_again() -> None:
    seen = gates(WeightLoRAPlus(preset="official", comeback=True, **EVENTS))
    dropped = [i for i, omega in enumerate(seen[2]) if omega == 0]
    assert any(seen[4][i] != 0 for i in dropped)


@pytest.mark.parametrize("cut", [4])
def test_it_goes_on_after_a_cut(cut: int) -> None:
    """The set of those that are out is part of the state."""
    official = WeightLoRAPlus(preset="official", **EVENTS)
    whole = Loop.start(official).run(6)
    first = Loop.start(official).run(cut)
    second = Loop.start(official)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.tuner.load_state_dict(first.tuner.state_dict())
    second.done = cut
    second.run(6)
    assert second.tuner.selection == whole.tuner.selection
    assert torch.tensor(list(second.tuner.omegas.values())).count_nonzero() == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "gausian"}, "mode='gausian' is not known; use one of gaussian, qr"),
        ({"options": {"noise": "gaussian"}}, "noise='gaussian' is not known; use one of normal, uniform"),
        ({"ranks": {"a": 4.0}}, "a is to grow to rank 4.0; give a whole number of 1 or more"),
    ],
)
def test_a_plan_of_growth_that_cannot_be_done_is_refused(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"ranks": {"a": 4}, "mode": "qr", "generator": torch.Generator(), "options": {}}
    GrowthPlan(**good)
    with pytest.raises(ConfigError, match=message):
        GrowthPlan(**good | wrong)

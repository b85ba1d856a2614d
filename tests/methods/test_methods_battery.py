"""What every method must do, run on a real model in a real loop."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from tests.builders import a_third, adapter_state, base, batch, batches, logits, lora, max_difference
from torch import Tensor, nn

from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.graft.selection import Selection
from weightlora.methods import (
    METHODS,
    AdapterMethod,
    DeepestAdapters,
    LoRA,
    Method,
    RandomAdapters,
    WeightLoRA,
    WeightLoRAPlus,
    method,
)
from weightlora.training import Tuner, attach

N, K, RANK, STEPS = 6, 2, 4, 9
HELD_OUT = [batch(4, seed=71), batch(4, seed=72)]
# Settings that fit a run of nine steps, where a method's own do not.
SHORT = {name: {"select_after": 4} for name in ("weightlora", "weightlora+", "lora_drop")} | {
    "gradient": {"batches": 3},
    "domlora": {"batches": 3},
    "cka": {"batches": 2},
    "gora": {"batches": 2},
    "flexlora": {"clients": 2, "rounds": 2},
    "flexora": {"select_after": 4},
    "increlora": {"init_warmup": 1, "incre_interval": 2, "top_h": 3},
    "alora": {"select_after": 2, "round_steps": 1, "rounds": 3, "moves": 3},
}
RANKED = {"adalora", "dynamic_lora", "increlora", "alora"}  # they spend ranks, not adapters
LORA = [name for name, kind in METHODS.items() if issubclass(kind, AdapterMethod)]
# They go through a run by the code of another one that is here; what is their own has tests in test_placements.py.
ALIKE = {
    "domlora": "gradient", "eva": "gora", "plop": "cka", "aletheia": "cka", "kappatune": "cka",
    "attention_output": "cka", "feed_forward": "cka",
}  # fmt: skip
HERE = [name for name in LORA if name not in ALIKE]
CASES = [(name, preset) for name in HERE for preset in ("recommended", "paper", "official")]
every_case = pytest.mark.parametrize(("name", "preset"), CASES, ids=["-".join(c) for c in CASES])


def has_k(name: str) -> bool:
    return "k" in {field.name for field in fields(METHODS[name])}


def build(name: str, preset: str, **settings: Any) -> Method:
    own = {"k": K} if has_k(name) else {}
    chosen: dict[str, Any] = {**own, **SHORT.get(name, {}), **settings}
    if (name, preset) == ("weightlora", "official"):
        chosen.pop("select_after")
    if (name, preset) == ("weightlora+", "official"):
        chosen["project_every"] = 2
    return method(name, preset, **chosen)


def settings(name: str, preset: str) -> tuple[Any, ...]:
    return name, *(item for item in sorted(build(name, preset).to_dict().items(), key=str) if item[0] != "preset")


# A preset that sets nothing of its own is the same run again.
DIFFERENT = list({repr(settings(*case)): case for case in reversed(CASES)}.values())[::-1]
each_different = pytest.mark.parametrize(("name", "preset"), DIFFERENT, ids=["-".join(case) for case in DIFFERENT])


@dataclass
class Loop:
    """A plain training loop with dropout, momentum and decay."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tuner: Tuner
    done: int = 0

    @classmethod
    def start(cls, made: Method, model: nn.Module | None = None, lr: float = 1e-2, path: Any = "auto") -> Loop:
        model = lora() if model is None else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
        model.train()
        tuner = attach(model, made, optimizer, max_steps=STEPS, engine=path, held_out=HELD_OUT)
        return cls(model, optimizer, tuner)

    def run(self, until: int, each: Callable[[int], None] | None = None) -> Loop:
        stream = batches()
        for step in range(1, until + 1):
            inputs = next(stream)
            if step <= self.done:
                continue
            torch.manual_seed(step)
            self.model(**inputs).loss.backward()
            self.optimizer.step()
            self.tuner.step()
            self.optimizer.zero_grad()
            self.done = step
            if each is not None:
                each(step)
        return self


@dataclass(frozen=True)
class Ended:
    """A whole run of a method: what it began with, what it chose and what it trained. Not to be changed."""

    before: list[Any] | None
    loop: Loop
    selection: Selection
    state: dict[str, Tensor]


@functools.cache
def ended(name: str, preset: str) -> Ended:
    """That run, done once for all tests that only look at it."""
    loop = Loop.start(build(name, preset))
    before = adapters(loop.model, "default") if loop.tuner.selection is None else None
    loop.run(STEPS)
    return Ended(before, loop, loop.tuner.finish(), adapter_state(loop.model))


@each_different
def test_starts_as_the_base_model(name: str, preset: str) -> None:
    loop = Loop.start(build(name, preset))
    now, then = logits(loop.model, batch()), logits(base("bert"), batch())
    # MiLoRA adds a part of W and takes it away again; IncreLoRA's reserve learns at E = 1e-5.
    assert torch.allclose(now, then, rtol=0, atol=1e-5) if name in ("milora", "increlora") else torch.equal(now, then)


@each_different
def test_keeps_exactly_k_and_ends_as_plain_peft(name: str, preset: str) -> None:
    run = ended(name, preset)
    loop, selection, before = run.loop, run.selection, run.before
    assert selection.n == N
    if name in RANKED:
        assert 0 < sum(choice.rank for choice in selection.kept) <= N * RANK
    elif name in ("flexora", "cka"):  # whole blocks of three
        assert selection.k in (3, 6)
    else:
        assert selection.k == (K if has_k(name) else N)
    assert (selection.method, selection.preset) == (name, build(name, preset).label)
    if before is not None:
        assert [c.name for c in selection.choices] == [a.name for a in before]
    live = adapters(loop.model)
    assert selection.names == tuple(a.name for a in live)
    assert [(c.rank, c.scale) for c in selection.kept] == [(a.rank, a.scale) for a in live]
    assert all(not getattr(m, "lora_variant", None) for m in loop.model.modules())
    assert Selection.from_json(selection.to_json()) == selection
    assert selection.why


@pytest.mark.parametrize(("name", "preset"), a_third(DIFFERENT, first=2), ids=["-".join(case) for case in DIFFERENT])
def test_deterministic(name: str, preset: str) -> None:
    again = Loop.start(build(name, preset)).run(STEPS)
    assert again.tuner.finish() == ended(name, preset).selection
    assert max_difference(adapter_state(again.model), ended(name, preset).state) == 0.0


LATE = [case for case in DIFFERENT if case[0] not in ("random", "top", "cka", "gora")]  # decide while training


@pytest.mark.parametrize(("name", "preset"), a_third(LATE, first=0), ids=["-".join(c) for c in LATE])
@pytest.mark.parametrize("cut", [1, 2])
def test_state_round_trip_in_mid_warm_up(name: str, preset: str, cut: int) -> None:
    whole = ended(name, preset)
    first = Loop.start(build(name, preset)).run(cut)
    assert first.tuner.selection is None
    weights, moments, progress = first.model.state_dict(), first.optimizer.state_dict(), first.tuner.state_dict()
    second = Loop.start(build(name, preset), lora(seed=0))
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    second.tuner.load_state_dict(progress)
    second.done = cut
    second.run(STEPS)
    assert second.tuner.finish() == whole.selection
    assert max_difference(adapter_state(second.model), whole.state) == 0.0


@pytest.mark.parametrize("name", HERE)
def test_a_bfloat16_model_with_accumulation_goes_through_the_seam_and_on(name: str) -> None:
    """What changes shape keeps its dtype, and takes steps of two micro-batches before and after."""
    model = lora().to(torch.bfloat16)
    loop = Loop.start(build(name, "recommended"), model)
    stream = batches()
    for _ in range(STEPS):
        for _ in range(2):
            (model(**next(stream)).loss / 2).backward()
        loop.optimizer.step()
        loop.tuner.step()
        loop.optimizer.zero_grad()
    selection = loop.tuner.finish()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert selection.names == tuple(a.name for a in adapters(model))
    assert bool(logits(model, batch()).isfinite().all())


@every_case
def test_settings_are_plain_data(name: str, preset: str) -> None:
    made = build(name, preset)
    data = json.loads(json.dumps(made.to_dict()))
    assert data.pop("name") == name
    assert METHODS[name](**data) == made


@pytest.mark.parametrize("name", ["weightlora", "weightlora+", "random", "top", "gradient"])
@pytest.mark.parametrize(("k", "count"), [(1, 1), (N, N), (0.5, 3), (1.0, N), (0.01, 1)])
def test_k_as_count_and_share(name: str, k: int | float, count: int) -> None:
    assert Loop.start(build(name, "recommended", k=k)).run(STEPS).tuner.finish().k == count


def test_lora_is_untouched_training() -> None:
    plain = lora()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    plain.train()
    for step, inputs in zip(range(1, STEPS + 1), batches(), strict=False):
        torch.manual_seed(step)
        plain(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for same in (LoRA(), WeightLoRA(k=1.0, select_after=4), RandomAdapters(k=N), DeepestAdapters(k=N)):
        loop = Loop.start(same, path="stock").run(STEPS)
        assert max_difference(adapter_state(loop.model), adapter_state(plain)) == 0.0


def refused(kind: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weightlora", "weightlora+", "random", "top", "gradient"])
@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, True, "3", float("nan")])
def test_k_that_no_model_satisfies(name: str, k: Any) -> None:
    what = "number" if isinstance(k, str | bool) else "count of adapters"
    refused(ConfigError, f"k=.* is not allowed; use a {what}", lambda: method(name, k=k))


@pytest.mark.parametrize("name", ["weightlora", "weightlora+", "random", "top", "gradient"])
def test_k_above_n(name: str) -> None:
    message = r"k=7 asks for more adapters than the 6 the model has; use 1\.\.6 or a fraction"
    refused(ScheduleError, message, lambda: Loop.start(build(name, "recommended", k=7)))


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (9, "select_after=9 needs more than the 9 optimizer steps of this run; use at most 8, or train longer"),
        (50, "select_after=50 needs more than the 9 optimizer steps"),
        (0.99, "select_after=0.99 needs more than the 9 optimizer steps"),
    ],
)
@pytest.mark.parametrize("name", ["weightlora", "weightlora+"])
def test_warm_up_that_does_not_fit(name: str, warmup: Any, message: str) -> None:
    refused(ScheduleError, message, lambda: Loop.start(method(name, k=K, select_after=warmup)))


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (0, "select_after=0 is not allowed; use a number of steps"),
        (-3, "select_after=-3 is not allowed"),
        (0.0, "select_after=0.0 is not allowed"),
        (True, "select_after=True is not allowed"),
        (2.5, "select_after=2.5 is not allowed; use a number of steps"),
        (float("inf"), "select_after=inf is not allowed"),
        (1.0, "select_after=1.0 may mean one step or the whole run"),
    ],
)
def test_a_warm_up_that_no_run_could_have(warmup: Any, message: str) -> None:
    refused(ConfigError, message, lambda: WeightLoRA(select_after=warmup))


def test_schedules_that_cannot_run() -> None:
    start = Loop.start
    refused(ScheduleError, "batches=9 needs more than the 9 opt", lambda: start(method("gradient", k=1, batches=9)))
    refused(ConfigError, "batches=2.5 is not allowed; use a whole number", lambda: method("gradient", batches=2.5))
    refused(
        ScheduleError, "score='omega' ranks gates that learn; set gate_lr", lambda: start(WeightLoRA(score="omega"))
    )
    refused(ScheduleError, r"weightlora\+ grows at the seam", lambda: start(WeightLoRAPlus(select_after=None)))
    refused(ScheduleError, "full uses no adapters, so attach has nothing to do", lambda: start(method("full")))
    start(WeightLoRA(k=N, score="omega", select_after=2))  # nothing to rank: gates held at 1 are allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"score": "luck"},
            "score='luck' is unknown; use one of omega, credit, next-credit, trapezoid, gradient, cross-gradient, ",
        ),
        ({"rule": "best"}, "rule='best' is unknown; use one of signed, positive, magnitude"),
        ({"k_schedule": "fast"}, "k_schedule='fast' is unknown; use one of constant, cubic, halving"),
        ({"init_A": "zero"}, "init_A='zero' is unknown; use one of lora, official"),
        ({"gate_lr": -1.0}, "gate_lr=-1.0 is not allowed"),
        ({"gate_lr": float("nan")}, "gate_lr=nan is not allowed"),
        ({"project_every": 0}, "project_every=0 is not allowed; use 1 or more, or None for only at T"),
        ({"growth": "svd"}, "growth='svd' is unknown; use one of gaussian, qr"),
        ({"noise": "pink"}, "noise='pink' is unknown; use one of normal, uniform"),
        ({"remainder": "keep"}, "remainder='keep' is unknown; use one of drop, top"),
        ({"max_rank": 0}, "max_rank=0 is not allowed"),
        ({"preset": "best"}, "preset='best' is unknown; use one of recommended, paper, official"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings: dict[str, Any], message: str) -> None:
    refused(ConfigError, message, lambda: WeightLoRAPlus(**settings))


def test_names_presets_and_settings_are_checked() -> None:
    refused(
        ConfigError,
        r"method 'weightlora\+\+' is unknown; did you mean 'weightlora\+'\?",
        lambda: method("weightlora++"),
    )
    refused(ConfigError, "method 'x' is unknown; the methods are weightlora, weightlora.*gradient", lambda: method("x"))
    refused(
        ConfigError, "preset='best' is unknown; use one of recommended, paper, official", lambda: method("top", "best")
    )
    refused(
        ConfigError,
        "random has no setting 'rank'; it has adapter_rate, b_rate, k, seed",
        lambda: method("random", rank=3),
    )
    refused(ConfigError, "lora has no setting 'k'; it has adapter_rate, b_rate", lambda: method("lora", k=3))


def test_a_refused_method_changes_nothing() -> None:
    model = lora()
    state: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for wrong in (method("top", k=99), WeightLoRA.from_preset("official", k=99), method("weightlora", select_after=99)):
        with pytest.raises(ScheduleError):
            attach(model, wrong, optimizer, max_steps=STEPS)
    assert max_difference(dict(model.state_dict()), state) == 0.0
    assert all(not getattr(m, "lora_variant", None) for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks

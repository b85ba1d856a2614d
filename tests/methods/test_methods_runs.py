"""What every method must do at the level of whole runs: resume, hand over a clean model and optimizer, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import QKV, a_third, adapter_state, base, batch, batches, logits, lora, max_difference, trainer
from tests.methods.test_methods_battery import (
    ALIKE,
    CASES,
    DIFFERENT,
    HELD_OUT,
    RANK,
    STEPS,
    K,
    Loop,
    build,
    each_different,
)
from torch import nn

import weightlora as wl
from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters
from weightlora.graft.tuners import save_own_format
from weightlora.methods import METHODS, AdapterMethod, Method, PeftMethod, method
from weightlora.training import fit

WIDTH = 16
KINDS = [*QKV["bert"], "intermediate.dense"]  # four kinds of modules, two shapes
CUT_AT_THE_END = {"weightlora"}  # a preset of it keeps n adapters to the last step: what was live is not what is left
BARE = ("full", "head")  # no adapters
OWN = {"dora": {}, "vera": {"r": 8}, "vb_lora": {"r": 2, "num_vectors": 6, "vector_length": 8}}
SHARES = {"adalora": {"tinit": 2, "tfinal": 2, "deltaT": 2}, "dynamic_lora": {"tinit": 2, "tfinal": 2, "deltaT": 2}}


def test_no_method_is_left_out() -> None:
    here = {name for name, _ in CASES} | set(OWN) | set(BARE) | {"zero-shot"}
    assert here | set(ALIKE) == set(METHODS)
    assert set(ALIKE.values()) <= here


def model_for(made: Method) -> nn.Module:
    """As the command line builds it: the tuner's own configuration where the method is one of PEFT's."""
    if not isinstance(made, PeftMethod):
        return base("bert")
    if isinstance(made, AdapterMethod):
        return lora()
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=8, lora_dropout=0.1, target_modules=list(QKV["bert"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(base("bert"), made.peft_config(config, [(WIDTH, WIDTH)] * 6))


RUNS = [*DIFFERENT, *((name, "recommended") for name in (*OWN, *BARE))]


def made_for(name: str, preset: str) -> Method:
    if name in OWN or name in BARE:
        return method(name, preset, **OWN.get(name, {}))
    return build(name, preset, **SHARES.get(name, {}))


@pytest.mark.parametrize(("name", "preset"), a_third(RUNS, first=1), ids=["-".join(run) for run in RUNS])
def test_a_trainer_killed_in_mid_schedule_ends_where_the_uninterrupted_one_does(
    name: str, preset: str, tmp_path: Path
) -> None:
    """From checkpoints in the middle of the schedule: of most methods before the seam and after it."""
    made = made_for(name, preset)
    arguments: dict[str, Any] = {"steps": STEPS, "count": 40, "save_strategy": "steps", "save_steps": 3}

    def run(resume: Any = False) -> tuple[nn.Module, Any]:
        each = trainer(tmp_path, model_for(made), **arguments)
        return each.model, fit(each, made, resume=resume, measure=False)

    whole, done = run()
    for cut in (3, 6):
        again, result = run(tmp_path / f"checkpoint-{cut}")
        assert result.selection == done.selection
        if isinstance(made, AdapterMethod):
            assert adapters(again) == adapters(whole)
        assert max_difference(dict(again.state_dict()), dict(whole.state_dict())) == 0.0


@each_different
def test_at_the_end_the_optimizer_holds_exactly_what_trains(name: str, preset: str) -> None:
    """No state of what is gone, no survivor left out; training can go on, and moves every adapter."""
    loop = Loop.start(build(name, preset)).run(STEPS)
    loop.tuner.finish()
    model, optimizer = loop.model, loop.optimizer
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in trained}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in trained}
    for state in ((p, optimizer.state[p]) for p in trained if p in optimizer.state):
        assert all(t.shape == state[0].shape for t in state[1].values() if t.dim())
    assert not [n for n, _ in model.named_parameters() if n.startswith("form_")]
    before = adapter_state(model)
    optimizer.zero_grad()
    for inputs, _ in zip(batches(seed=4), range(2), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapter_state(model)
    assert all(not torch.equal(after[key], before[key]) for key in before if "lora_" in key)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("name", a_third(sorted({name for name, _ in CASES}), first=2))
def test_every_implementation_of_adam_goes_through_the_changes(name: str, implementation: str) -> None:
    """They keep their step counters in different places, and look at parameters in lists."""
    model = lora()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, **{implementation: True})
    tuner = wl.attach(model.train(), build(name, "recommended"), optimizer, max_steps=STEPS, held_out=HELD_OUT)
    for _, inputs in zip(range(STEPS), batches(), strict=False):
        for _ in range(2):
            alive = model(**inputs).loss / 2  # this graph outlives every change of shape
            alive.backward(retain_graph=True)
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    tuner.finish()
    model(**batch()).loss.backward()
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters() if p.requires_grad}
    assert bool(logits(model, batch()).isfinite().all())


@each_different
def test_the_export_is_the_live_model_and_opens_in_stock_peft(name: str, preset: str, tmp_path: Path) -> None:
    loop = Loop.start(build(name, preset, **SHARES.get(name, {}))).run(STEPS)
    live = logits(loop.model, batch()) if loop.tuner.selection is not None or name not in CUT_AT_THE_END else None
    loop.tuner.finish()
    live = logits(loop.model, batch()) if live is None else live
    done = wl.export(loop.model, tmp_path / "out", sample=batch())
    assert done.max_difference <= 1e-5
    stock = PeftModel.from_pretrained(base("bert"), tmp_path / "out")
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(stock, batch()), live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_what_is_no_lora_says_so_and_is_saved_in_its_own_format(name: str, tmp_path: Path) -> None:
    made = made_for(name, "recommended")
    each = trainer(tmp_path / "run", model_for(made), steps=3)
    result = fit(each, made, measure=False)
    with pytest.raises(
        AdapterError, match=r"is not plain LoRA, so no export profile can hold this adapter; save it in PEFT's"
    ):
        wl.export(result, tmp_path / "out", sample=batch())
    assert not (tmp_path / "out").exists()
    save_own_format(each.model, tmp_path / "own", None)
    stock = PeftModel.from_pretrained(base("bert"), tmp_path / "own")
    torch.testing.assert_close(logits(stock, batch()), logits(each.model, batch()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*OWN, *BARE])
def test_deterministic_too(name: str, tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        made = made_for(name, "recommended")
        each = trainer(tmp_path, model_for(made), steps=4)
        fit(each, made, measure=False)
        states.append(dict(each.model.state_dict()))
    assert max_difference(*states) == 0.0


def pairs(live: Any) -> int:
    """``sum r (d_in + d_out)``, what is shared counted once."""
    return sum(a.rank * (a.d_in + a.d_out) for a in live if a.tied is None)


@each_different
def test_parameters_by_the_formula_of_the_method(name: str, preset: str) -> None:
    """Two shapes and two kinds of modules, n = 4: counted on the trained model, by the policy, and by hand."""
    model = lora(targets=["query", "intermediate.dense"])
    loop = Loop.start(build(name, preset), model)
    started = {id(p): p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    started |= {id(loop.tuner._driver.gates.omega): 4} if loop.tuner._driver.policy.setup.gates == "learn" else {}  # type: ignore[union-attr]
    counts = loop.tuner._driver.counts
    if loop.tuner.selection is None:
        assert counts["trainable"] == sum(started.values())
    loop.run(STEPS)
    loop.tuner.finish()
    live = adapters(model)
    numbers = {id(p): p.numel() for n, p in model.named_parameters() if "lora_" in n}
    shapes = [(WIDTH, WIDTH), (WIDTH, 2 * WIDTH)] * 2
    if name not in ("nora", "milora", "melora", "tied_lora"):  # those train other numbers than plain LoRA has
        assert sum(numbers.values()) == pairs(live)
    by_hand = {
        "nora": sum(2 * RANK * min(4 * RANK, WIDTH) for _ in shapes),
        "milora": sum(RANK * (i + o) for i, o in shapes),
        "melora": sum(RANK * (i + o) for i, o in shapes),
        "tied_lora": sum(RANK * (i + o) for i, o in set(shapes)) + sum(RANK + o for _, o in shapes),
    }.get(name, pairs(live))
    if preset != "recommended" and name in ("adalora", "dynamic_lora", "increlora"):
        by_hand += sum(a.rank for a in live)  # E, to the end
    assert counts["effective"] == by_hand
    if METHODS[name].chooses_k is False and name in ("weightlora", "random", "top", "gradient"):
        assert len(live) == K

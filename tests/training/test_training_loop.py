"""A loop of one's own: the same decisions and the same adapter as by hand, and as through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.builders import adapter_state, base, batches, lora, max_difference, trainer
from torch import Tensor, nn

from weightlora.errors import AdapterError, ConfigError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.methods import (
    DeepestAdapters,
    FullFineTuning,
    Method,
    OneShotGradient,
    RandomAdapters,
    WeightLoRA,
    WeightLoRAPlus,
)
from weightlora.training import attach, fit

Inputs = dict[str, Tensor]


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    own = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(own, **{"lr": 1e-2, "weight_decay": 0.1, **settings})


def stock_steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Inputs], first: int = 0) -> None:
    model.train()
    for step, inputs in enumerate(data, first):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def some(count: int) -> list[Inputs]:
    stream = batches()
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("score", ["credit", "trapezoid"])
def test_two_phases_by_hand(score: Any) -> None:
    """Stock LoRA for T steps; a stock model with K adapters gets their values and Adam's memory, and trains on."""
    data, seam = some(9), 4
    model = lora()
    optimizer = adamw(model)
    model.train()
    tuner = attach(model, WeightLoRA(k=2, select_after=seam, score=score), optimizer, engine="stock")
    for step, inputs in enumerate(data):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        made = tuner.step()
        optimizer.zero_grad()
        assert (made is not None) == (step + 1 == seam)
        assert (tuner.selection is None) == (step + 1 < seam)
    assert tuner.selection is not None

    first = lora()
    before = adamw(first)
    stock_steps(first, before, data[:seam])
    second = get_peft_model(base("bert"), tuner.selection.lora_config(task_type="SEQ_CLS", lora_dropout=0.1))
    after = adamw(second)
    old = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(old[name].data)
            after.state[parameter] = {key: value.clone() for key, value in before.state[old[name]].items()}
    stock_steps(second, after, data[seam:], seam)
    assert max_difference(adapter_state(model), adapter_state(second)) == 0.0


@pytest.mark.parametrize("made", [RandomAdapters(k=3, seed=2), DeepestAdapters(k=2)])
def test_a_choice_before_training_is_stock_lora_on_the_same_targets(made: Method) -> None:
    data = some(6)
    model = lora()
    optimizer = adamw(model)
    tuner = attach(model, made, optimizer, engine="stock")
    assert tuner.selection is not None
    model.train()
    for step, inputs in enumerate(data):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    stock = get_peft_model(base("bert"), tuner.selection.lora_config(task_type="SEQ_CLS", lora_dropout=0.1))
    start = dict(lora().named_parameters())
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    stock_steps(stock, adamw(stock), data)
    assert max_difference(adapter_state(model), adapter_state(stock)) == 0.0


FITTED = [
    WeightLoRA(k=2, select_after=5),
    WeightLoRA.from_preset("paper", k=2, select_after=5),
    WeightLoRA.from_preset("official", k=2),
    WeightLoRAPlus(k=2, select_after=5),
    WeightLoRAPlus.from_preset("paper", k=2, select_after=5),
    OneShotGradient(k=2, batches=5),
    RandomAdapters(k=2),
]


@pytest.mark.parametrize("made", FITTED, ids=lambda m: f"{m.name}-{m.preset}")
def test_the_loop_and_the_trainer_agree(made: Method, tmp_path: Path) -> None:
    seen: list[Inputs] = []

    def look(module: nn.Module, _args: Any, kwargs: Any) -> None:
        if module.training:
            seen.append({k: v.clone() for k, v in kwargs.items() if k in ("input_ids", "attention_mask", "labels")})

    through = lora(dropout=0.0)
    through.register_forward_pre_hook(look, with_kwargs=True)
    each = trainer(tmp_path, through, max_grad_norm=0.0, optim="adamw_torch", weight_decay=0.0)
    result = fit(each, made, measure=False)

    model = lora(dropout=0.0)
    optimizer = adamw(model, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (12 - step) / 12)
    tuner = attach(model, made, optimizer, max_steps=12)
    assert len(seen) == 12
    model.train()
    for inputs in seen:
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        schedule.step()
        optimizer.zero_grad()
    assert tuner.finish() == result.selection
    assert max_difference(adapter_state(model), adapter_state(through)) == 0.0


def test_step_is_called_once_after_each_optimizer_step() -> None:
    model = lora()
    optimizer = adamw(model)
    tuner = attach(model, WeightLoRA(k=2, select_after=3), optimizer)
    message = r"tuner.step\(\) counts optimizer steps; call it once after each optimizer.step\(\)"
    with pytest.raises(ScheduleError, match=message):
        tuner.step()
    model(**some(1)[0]).loss.backward()
    optimizer.step()
    assert tuner.step() is None
    with pytest.raises(ScheduleError, match=message):
        tuner.step()
    assert tuner.state_dict()["step"] == 1


def test_a_share_of_the_run_needs_its_length() -> None:
    model = lora()
    with pytest.raises(ScheduleError, match="select_after is a share of the run; give attach"):
        attach(model, WeightLoRA(k=2), adamw(model))
    assert attach(model, WeightLoRA(k=2, select_after=0.5), adamw(model), max_steps=4).selection is None


def test_what_attach_refuses() -> None:
    plain = base("bert")
    with pytest.raises(AdapterError, match="has no LoRA adapters; wrap it first"):
        attach(plain, WeightLoRA(k=2, select_after=3), adamw(plain))
    model = lora()
    with pytest.raises(ScheduleError, match="full uses no adapters"):
        attach(model, FullFineTuning(), adamw(model))


def test_finish_decides_and_lets_go() -> None:
    model = lora()
    optimizer = adamw(model)
    tuner = attach(model, WeightLoRA.from_preset("official", k=2), optimizer)
    for step, inputs in enumerate(some(4)):
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        assert tuner.step() is None
        optimizer.zero_grad()
    last = tuner.omegas
    selection = tuner.finish()
    assert selection.names == tuple(name for name, omega in last.items() if omega != 0)
    assert tuner.omegas == last == {c.name: c.omega for c in selection.choices}
    assert tuner.selection is selection
    assert tuner.finish() is selection
    assert [a.name for a in adapters(model)] == list(selection.names)
    assert not optimizer._optimizer_step_pre_hooks
    model(**some(1)[0]).loss.backward()
    optimizer.step()  # nothing of ours is left in it


def test_the_gate_rate_follows_the_schedule() -> None:
    """``gate_lr_scheduled``: omega's step is ``gate_lr * lr / peak``, with the warm-up of the schedule in it."""
    moved = []
    for factor in (1.0, 0.25):
        model = lora(dropout=0.0)
        optimizer = adamw(model, weight_decay=0.0)
        made = WeightLoRA(k=6, select_after=9, score="omega", gate_lr=0.1, gate_lr_scheduled=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, f=factor: 1.0 if step == 0 else f)
        tuner = attach(model, made, optimizer)
        for inputs in some(2):
            model(**inputs).loss.backward()
            optimizer.step()
            tuner.step()
            schedule.step()
            optimizer.zero_grad()
        moved.append(torch.tensor(list(tuner.omegas.values())) - 1)
    assert float(moved[0].abs().min()) > 0
    # omega is near 1, where float32 resolves 1e-7.
    assert torch.allclose(moved[1], 0.25 * moved[0], atol=3e-7)


@pytest.mark.parametrize("factor", [-0.5, float("nan")])
def test_a_gate_rate_that_no_step_can_have_is_refused(factor: float) -> None:
    model = lora(dropout=0.0)
    optimizer = adamw(model, weight_decay=0.0)
    made = WeightLoRA(k=6, select_after=9, score="omega", gate_lr=0.1, gate_lr_scheduled=True)
    tuner = attach(model, made, optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= factor  # as a schedule may have made it
    (inputs,) = some(1)
    model(**inputs).loss.backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"gate lr=.* is not usable; it must be a finite number >= 0"):
        tuner.step()


def test_accumulated_gradients_are_one_step() -> None:
    states = []
    for parts in (1, 2):
        model = lora(dropout=0.0).double()
        optimizer = adamw(model)
        tuner = attach(model, WeightLoRA.from_preset("paper", k=2, select_after=4), optimizer)
        for inputs in some(6):
            for part in range(parts):
                piece = {k: v[part::parts] for k, v in inputs.items()}
                (model(**piece).loss / parts).backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
        assert tuner.selection is not None
        states.append((tuner.selection.names, adapter_state(model)))
    assert states[0][0] == states[1][0]
    # Omega is float32 whatever the model is: its rounding (1e-7) is all that separates the two.
    assert max_difference(states[0][1], states[1][1]) < 1e-4

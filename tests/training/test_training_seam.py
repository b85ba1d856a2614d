"""What the seam does to a trainer: who trains on, what a step costs, what is logged, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.builders import (
    FAMILIES,
    Spy,
    a_third,
    adapter_state,
    base,
    long,
    lora,
    max_difference,
    pairs,
    recomputing,
    trainer,
    warm,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora.errors import AdapterError, ConfigError, ScheduleError, WeightLoRAError
from weightlora.graft.adapters import adapters
from weightlora.graft.variant import FormVariant
from weightlora.methods import (
    DeepestAdapters,
    FullFineTuning,
    LoRA,
    Method,
    RandomAdapters,
    WeightLoRA,
    WeightLoRAPlus,
    method,
)
from weightlora.training import fit
from weightlora.training.trainer import measure_step

PAPER = WeightLoRA.from_preset("paper", k=2, select_after=5)


def training(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "made", [PAPER, WeightLoRAPlus(k=2, select_after=5), RandomAdapters(k=3), DeepestAdapters(k=1)]
)
def test_the_optimizer_holds_exactly_survivors_and_head(made: Method, tmp_path: Path) -> None:
    each = trainer(tmp_path)
    before = training(each.model)
    each.add_callback(spy := Spy())
    result = fit(each, made, measure=False)
    after = training(each.model)
    seam = result.seam_step or 0
    assert all(spy.held[step] == before for step in range(1, seam + 1))
    assert all(spy.held[step] == after for step in range(seam + 1, 13))
    named = {n for n, p in each.model.named_parameters() if p.requires_grad}
    kept = result.selection.names  # type: ignore[union-attr]
    assert {n for n in named if "lora_" in n} == {
        f"base_model.model.{name}.lora_{part}.default.weight" for name in kept for part in "AB"
    }
    assert {n for n in named if "lora_" not in n} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert all(p in each.optimizer.optimizer.state for p in each.model.parameters() if p.requires_grad)
    assert result.phases[-1].trainable_params == sum(p.numel() for p in each.model.parameters() if p.requires_grad)


METHODS = {made.name: made for made in (PAPER, WeightLoRAPlus(k=2, select_after=5), DeepestAdapters(k=2))}


@pytest.mark.parametrize(
    ("family", "name", "path"), a_third(pairs(FAMILIES, list(METHODS), ["stock", "auto"]), first=0)
)
def test_a_step_costs_what_stock_peft_on_the_survivors_costs(family: str, name: str, path: Any, tmp_path: Path) -> None:
    each = trainer(tmp_path, lora(family, layers=4))
    whole = measure_step(each)
    assert whole is not None
    result = fit(each, METHODS[name], engine=path)
    assert result.selection is not None
    final = result.phases[-1]
    config = result.selection.lora_config(task_type="SEQ_CLS", lora_dropout=0.1)
    stock = measure_step(trainer(tmp_path, get_peft_model(base(family, layers=4), config)))
    assert stock is not None
    assert final.kept_activation_bytes is not None
    assert final.flops_per_step is not None
    if path == "stock":
        assert (final.kept_activation_bytes, final.flops_per_step) == (stock.kept_activation_bytes, stock.flops)
    else:  # the lean path keeps no more, but for the seed (8 bytes) of each dropout, for at most as many operations
        assert final.kept_activation_bytes <= stock.kept_activation_bytes + 8 * result.selection.k
        assert final.flops_per_step <= stock.flops
    if name == "top":
        assert final.kept_activation_bytes < 0.5 * whole.kept_activation_bytes
        assert final.flops_per_step < 0.8 * whole.flops


def test_phases_say_what_ran(tmp_path: Path) -> None:
    result = fit(trainer(tmp_path), PAPER, measure=False)
    first, last = result.phases
    assert [(p.name, p.steps, p.micro_batch, p.accumulation) for p in (first, last)] == [
        ("warmup", 5, 4, 1),
        ("final", 7, 4, 1),
    ]
    head = 2 * 16 + 2
    assert first.trainable_params == 6 * 4 * 32 + head + 6  # six adapters, the head, six gates
    assert last.trainable_params == result.selection.k * 4 * 32 + head  # type: ignore[union-attr]
    assert (result.max_steps, result.seam_step) == (12, 5)
    assert result.metrics["train_loss"] > 0


# logging


def entries(each: Trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in each.state.log_history if key in entry}


@pytest.mark.parametrize("wanted", ["summary", "all"])
def test_omega_is_logged_beside_the_trainers_own_entries(wanted: Any, tmp_path: Path) -> None:
    each = trainer(tmp_path, logging_steps=1)
    result = fit(each, PAPER, log_omegas=wanted, measure=False)
    assert sorted(entries(each, "loss")) == list(range(1, 13))
    assert sorted(entries(each, "learning_rate")) == list(range(1, 13))
    for key in ("omega/alive", "omega/max", "omega/min"):
        assert sorted(entries(each, key)) == [1, 2, 3, 4, 5]
    assert list(entries(each, "omega/alive").values()) == [6, 2, 2, 2, 2]
    assert (entries(each, "omega/max")[1], entries(each, "omega/min")[1]) == (1.0, 1.0)
    last = {c.name: c.omega for c in result.selection.choices}  # type: ignore[union-attr]
    assert entries(each, "omega/max")[5] == max(last.values())
    logged = {name: entries(each, f"omega/{name}") for name in last}
    if wanted == "all":
        assert {name: steps[5] for name, steps in logged.items()} == last
    else:
        assert not any(logged.values())


def test_logs_are_those_of_stock_training(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"logging_steps": 1, "logging_first_step": True}
    plain = trainer(tmp_path / "a", **arguments)
    plain.train()
    ours = trainer(tmp_path / "b", **arguments)
    fit(ours, WeightLoRA(k=1.0, select_after=5, score="omega"), engine="stock", measure=False)
    for key in ("loss", "learning_rate", "grad_norm"):
        assert entries(ours, key) == entries(plain, key)


class Norms(TrainerCallback):
    """The norm over the model's own gradients at the moment when they are final, and omega's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms: dict[int, float] = {}
        self.gates: dict[int, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norms[state.global_step + 1] = float(torch.stack([g.norm() for g in grads]).norm())
        variants = [m.lora_variant["default"] for m in self.model.modules() if getattr(m, "lora_variant", None)]
        if variants and isinstance(variants[0], FormVariant) and variants[0].form.omega.grad is not None:
            self.gates[state.global_step + 1] = float(variants[0].form.omega.grad.norm())


@pytest.mark.parametrize("limit", [1e9, 1e-2])
def test_omegas_gradient_stays_out_of_clipping(limit: float, tmp_path: Path) -> None:
    model = warm(lora(dropout=0.0), scale=2.0)
    each = trainer(tmp_path, model, logging_steps=1, max_grad_norm=limit)
    each.add_callback(norms := Norms(model))
    fit(each, WeightLoRA(k=6, select_after=5, score="omega", gate_lr=1e-6), measure=False)
    assert sorted(norms.gates) == [1, 2, 3, 4, 5]
    assert min(norms.gates.values()) > 1e-2
    for step, norm in norms.norms.items():
        if limit == 1e9:  # nothing is clipped: what is logged is the norm over the model alone
            assert entries(each, "grad_norm")[step] == pytest.approx(norm, rel=1e-5)
        else:  # clipped to the limit exactly: nothing else took a share of it
            assert norm == pytest.approx(limit, rel=1e-3)


# the backward pass ends at the lowest survivor


class Depth(TrainerCallback):
    """For each step: which blocks' outputs belong to the backward pass."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.steps: dict[int, list[bool]] = {}
        self.now: list[bool] = []
        for block in blocks:
            block.register_forward_hook(self.look)

    def look(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if module.training and len(self.now) < 4:
            self.now.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[state.global_step + 1] = list(self.now)


def lowest(selection: Any) -> list[bool]:
    block = min(int(name.split(".layer.")[-1].split(".")[0].replace("model.layers.", "")) for name in selection.names)
    return [index >= block for index in range(4)]


CHECKPOINTING = {
    "off": {},
    "default": recomputing(),
    "non-reentrant": recomputing(use_reentrant=False),
    "reentrant": recomputing(use_reentrant=True),
}
EACH_WAY = ["off", *long("default"), "non-reentrant", "reentrant"]


@pytest.mark.parametrize("made", [DeepestAdapters(k=2), WeightLoRA(k=2, select_after=5)], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", EACH_WAY)
def test_gradient_checkpointing_ends_where_it_must(made: Method, kind: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", lora(layers=4))
    wanted = fit(plain, made, measure=False)
    model = lora(layers=4)
    each = trainer(tmp_path / "ours", model, save_strategy="steps", save_steps=4, **CHECKPOINTING[kind])
    each.add_callback(depth := Depth(list(model.base_model.model.bert.encoder.layer)))
    result = fit(each, made, measure=False)
    assert result.selection == wanted.selection
    assert max_difference(adapter_state(model), adapter_state(plain.model)) == 0.0
    seam = result.seam_step or 0
    # In older releases a block's hooks run inside its reentrant checkpoint, where nothing has a gradient.
    seen = kind != "reentrant" or "__call__" not in vars(GradientCheckpointingLayer)
    assert all(depth.steps[step] == [seen] * 4 for step in range(1, seam + 1))
    assert all(depth.steps[step] == lowest(result.selection) for step in range(seam + 1, 13))
    # And in a new process that begins after the seam.
    again = lora(layers=4)
    resumed = trainer(tmp_path / "ours", again, save_strategy="no", **CHECKPOINTING[kind])
    resumed.add_callback(depth := Depth(list(again.base_model.model.bert.encoder.layer)))
    fit(resumed, made, resume=tmp_path / "ours" / "checkpoint-8", measure=False)
    assert sorted(depth.steps) == [9, 10, 11, 12]
    assert all(depth.steps[step] == lowest(result.selection) for step in (9, 10, 11, 12))
    assert max_difference(adapter_state(again), adapter_state(plain.model)) == 0.0


@pytest.mark.parametrize("kind", EACH_WAY)
def test_the_cost_measured_is_that_of_the_step_that_runs(kind: str, tmp_path: Path) -> None:
    """Counted again in the run itself: the FLOPs of forward, recomputation and backward of one step of each phase."""
    made = WeightLoRA(k=1, select_after=3)
    counted: dict[int, int] = {}

    class Counting(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with FlopCounterMode(display=False) as counter:
                loss = super().training_step(*args, **kwargs)
            counted[self.state.global_step + 1] = counter.get_total_flops()
            return loss

    result = fit(trainer(tmp_path, lora(layers=4), steps=5, cls=Counting, **CHECKPOINTING[kind]), made)
    assert [p.flops_per_step for p in result.phases] == [counted[3], counted[5]]
    assert counted[5] < counted[3]


# refused before the first step


def stop_at_once(each: Trainer, made: Method, kind: type[WeightLoRAError], message: str, **options: Any) -> None:
    out = Path(each.args.output_dir)
    state: dict[str, Tensor] = {k: v.clone() for k, v in each.model.state_dict().items()}
    size, random = each.args.per_device_train_batch_size, torch.random.get_rng_state()
    steps: list[int] = []
    each.model.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(kind, match=message) as caught:
        fit(each, made, **options)
    assert "\n" not in str(caught.value)
    assert not steps
    assert not out.exists() or not list(out.iterdir())
    assert all(torch.equal(v, state[k]) for k, v in each.model.state_dict().items())
    assert not any(getattr(m, "lora_variant", None) for m in each.model.modules())
    assert each.optimizer is None
    assert each.args.per_device_train_batch_size == size
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not [c for c in each.callback_handler.callbacks if type(c).__module__.startswith("weightlora")]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            WeightLoRA(k=7, select_after=3),
            r"k=7 asks for more adapters than the 6 the model has; use 1\.\.6 or a fraction",
        ),
        (WeightLoRA(k=2, select_after=12), "select_after=12 needs more than the 12 optimizer steps of this run"),
        (WeightLoRA.from_preset("official", k=9), "k=9 asks for more"),
        (WeightLoRA(score="omega"), "score='omega' ranks gates that learn; set gate_lr"),
        (WeightLoRAPlus(select_after=None), r"weightlora\+ grows at the seam"),
        (method("gradient", batches=12), "batches=12 needs more than the 12 optimizer steps"),
        (DeepestAdapters(k=7), "k=7 asks for more"),
        (RandomAdapters(k=7), "k=7 asks for more"),
    ],
)
def test_schedules_that_cannot_run(made: Method, message: str, tmp_path: Path) -> None:
    stop_at_once(trainer(tmp_path / "out"), made, ScheduleError, message)


def test_a_share_of_a_short_run_goes_past_the_step_without_a_rate(tmp_path: Path) -> None:
    """The schedule's rate is 0 in step 1, so that nothing could be chosen after it."""
    result = fit(trainer(tmp_path, steps=6, warmup_steps=1), WeightLoRA(k=2))
    assert result.selection is not None
    assert (result.selection.step, result.selection.k) == (2, 2)


def test_the_length_of_a_run_in_epochs_counts(tmp_path: Path) -> None:
    each = trainer(tmp_path / "out", steps=-1, num_train_epochs=2, gradient_accumulation_steps=3)
    # 8 batches of 4, three at a time: 3 steps an epoch.
    stop_at_once(each, WeightLoRA(k=2, select_after=6), ScheduleError, "select_after=6 needs more than the 6 optimizer")


def test_other_things_that_cannot_run(tmp_path: Path) -> None:
    def each(**arguments: Any) -> Trainer:
        return trainer(tmp_path / "out", **arguments)

    stop_at_once(each(model=base("bert")), LoRA(), AdapterError, "has no LoRA adapters; wrap it first")
    stop_at_once(
        each(), FullFineTuning(), AdapterError, "trains the plain model; give the trainer a model without adapters"
    )
    sizes = r"a micro-batch of 3 does not divide the effective batch of 4; use one of \[1, 2, 4\]"
    stop_at_once(each(), PAPER, ConfigError, sizes, micro_batch=3)
    stop_at_once(each(), PAPER, ConfigError, "micro_batch=0 is not allowed", final_micro_batch=0)
    stop_at_once(each(), PAPER, WeightLoRAError, "nowhere is not a whole checkpoint", resume=tmp_path / "nowhere")
    nothing = each()
    nothing.train_dataset = None
    stop_at_once(nothing, PAPER, ConfigError, "the trainer has no train_dataset; give it one")
    rebuilt = each()
    rebuilt.model_init = lora
    stop_at_once(rebuilt, PAPER, ConfigError, "model_init rebuilds the model inside train")


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_something_else_ends_the_warm_up(tmp_path: Path) -> None:
    each = trainer(tmp_path)
    each.add_callback(StopAt(3))
    with pytest.raises(
        ScheduleError, match="training stopped at step 3, before the seam at 5; something else ended it"
    ):
        fit(each, PAPER, measure=False)


def test_something_else_ends_the_second_phase(tmp_path: Path) -> None:
    each = trainer(tmp_path)
    each.add_callback(StopAt(8))
    result = fit(each, PAPER, measure=False)
    assert each.state.global_step == 8
    assert [p.steps for p in result.phases] == [5, 3]


# other ways to run


def test_select_only_stops_at_the_seam(tmp_path: Path) -> None:
    wanted = fit(trainer(tmp_path / "a"), PAPER, measure=False)
    short = trainer(tmp_path / "b")
    result = fit(short, PAPER, select_only=True, measure=False)
    assert result.selection == wanted.selection
    assert short.state.global_step == 5
    assert [p.name for p in result.phases] == ["warmup"]
    assert len(adapters(short.model)) == result.selection.k  # type: ignore[union-attr]


def test_full_fine_tuning_is_the_trainers_own(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", base("bert"))
    plain.train()
    ours = trainer(tmp_path / "b", base("bert"))
    result = fit(ours, FullFineTuning(), measure=False)
    states = [{k: v for k, v in t.model.state_dict().items() if v.is_floating_point()} for t in (plain, ours)]
    assert max_difference(*states) == 0.0
    assert result.selection is None
    assert result.phases[0].trainable_params == sum(p.numel() for p in plain.model.parameters())


def test_a_bf16_run_goes_through_the_seam(tmp_path: Path) -> None:
    each = trainer(tmp_path, bf16=True)
    result = fit(each, WeightLoRAPlus.from_preset("paper", k=2, select_after=5), measure=False)
    assert {p.dtype for p in each.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in each.model.parameters())
    assert result.selection is not None
    assert result.selection.k == 2


def test_the_second_run_on_one_trainer_is_a_run_of_its_own(tmp_path: Path) -> None:
    calls: list[Callable[[Trainer], Any]] = [
        lambda t: fit(t, PAPER),
        lambda t: fit(t, DeepestAdapters(k=1), overwrite=True),
    ]
    each = trainer(tmp_path)
    first, second = (call(each) for call in calls)
    assert (first.selection.n, second.selection.n, second.selection.k) == (6, 2, 1)
    assert second.selection.names == first.selection.names[-1:]

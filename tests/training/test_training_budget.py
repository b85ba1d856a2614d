"""Budgets: what a run really holds in both phases against what was allowed, and how a tighter one changes the run."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, long, lora, max_difference, recomputing, trainer
from transformers import Trainer, TrainerCallback

from weightlora.errors import BudgetError, ConfigError, ScheduleError
from weightlora.graft.manifest import Manifest
from weightlora.methods import Budget, Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import FitResult, attach, fit
from weightlora.training.budget import allow

LAYERS = {"bert": 4, "bart": 2}  # of each of its two towers
BATCH, STEPS = 8, 8
RAGGED = [5, 8, 3, 8, 6, 7, 4, 8]


def ragged() -> list[dict[str, Any]]:
    """Rows of different lengths: the first batch is not the largest one."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in RAGGED * 4:
        ids = torch.randint(5, 60, (length,), generator=generator)
        ids[-1] = 2
        rows.append({"input_ids": ids, "labels": int(ids[0] > 32)})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of a batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [torch.nn.functional.pad(row["input_ids"], (0, longest - len(row["input_ids"])), value=1) for row in rows]
    ids = torch.stack(padded)
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def made(out: Path, family: str = "bert", **arguments: Any) -> Trainer:
    model = lora(family, layers=LAYERS[family])
    each = trainer(out, model, steps=STEPS, data=ragged(), per_device_train_batch_size=BATCH, **arguments)
    each.data_collator = collate
    return each


class Ledger(TrainerCallback):
    """What tensors are there after each step: parameters, buffers, and the optimizer's own state."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.micro: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        parameters = {id(p): p for p in model.parameters()}
        tensors = [*parameters.values(), *model.buffers()]
        tensors += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        total = sum(t.numel() * t.element_size() for t in tensors)
        total += sum(p.numel() * p.element_size() for p in parameters.values() if p.requires_grad)  # gradients
        self.held[state.global_step] = total
        self.micro[state.global_step] = args.per_device_train_batch_size


def run(
    out: Path, method: Method, family: str = "bert", *, measure: bool = True, **arguments: Any
) -> tuple[FitResult, Ledger]:
    each = made(out, family, **arguments)
    ledger = Ledger()
    each.add_callback(ledger)
    return fit(each, method, measure=measure), ledger


@functools.cache
def whole(family: str = "bert") -> tuple[int, int]:
    """Bytes that warm-up takes at the full batch, and at a micro-batch of 1."""
    planned = allow(made(Path("unused"), family), WeightLoRA(memory="1TiB"), (None, None)).budget
    assert planned is not None
    with pytest.raises(BudgetError) as caught:
        allow(made(Path("unused"), family), WeightLoRA(memory=1), (None, None))
    return int(planned.facts["warmup_total"]), caught.value.smallest


def spent(result: FitResult, ledger: Ledger) -> tuple[int, int]:
    """Counted bytes of both phases: what was there, and what autograd kept of a measured micro-batch."""
    seam = result.seam_step or 0
    kept = [phase.kept_activation_bytes or 0 for phase in result.phases]
    return ledger.held[seam] + kept[0], max(ledger.held[step] for step in ledger.held if step > seam) + kept[1]


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", WeightLoRA), *long(("bert", WeightLoRAPlus), ("bart", WeightLoRA))],
)
def test_both_phases_stay_within_the_budget(family: str, method: Any, tmp_path: Path) -> None:
    most, least = whole(family)
    seen = []
    for share in (1.0, 0.4, 0.0):
        memory = int(least + share * (most - least))
        result, ledger = run(tmp_path / str(share), method(memory=memory, select_after=4), family)
        assert result.selection is not None
        placement = result.selection.placement
        assert placement is not None
        warm, final = spent(result, ledger)
        assert warm <= placement["warmup_total"] <= memory
        assert final <= placement["total"] <= memory == placement["budget"]
        assert placement["kind"] == "memory"
        assert placement["importance"] == pytest.approx(sum(c.score or 0 for c in result.selection.kept))
        phases = [(phase.micro_batch, phase.micro_batch * phase.accumulation) for phase in result.phases]
        assert phases == [(placement["warmup_micro_batch"], BATCH), (placement["micro_batch"], BATCH)]
        assert ledger.micro == {s: phases[s > 4][0] for s in range(1, STEPS + 1)}
        seen.append((placement["warmup_micro_batch"], placement["micro_batch"], result.selection.k, placement["depth"]))
    # With room for all, every adapter of positive credit is taken; with less, fewer, or at a smaller micro-batch.
    assert seen[0][:2] == (BATCH, BATCH)
    assert seen[-1][0] == 1
    assert [row[0] for row in seen] == sorted((row[0] for row in seen), reverse=True)
    assert len(set(seen)) == len(seen)
    same = [row for row in seen if row[1] == BATCH]
    assert len(same) >= 2
    assert [row[2] for row in same] == sorted((row[2] for row in same), reverse=True)


def test_the_prediction_is_what_is_held_and_not_just_above_it(tmp_path: Path) -> None:
    each = made(tmp_path)
    each.data_collator = lambda rows: collate([{**rows[0], "input_ids": torch.arange(5, 13)}] * len(rows))
    each.add_callback(ledger := Ledger())
    most, least = whole()
    result = fit(each, WeightLoRA(memory=(most + 2 * least) // 3, select_after=4))
    warm, final = spent(result, ledger)
    assert result.selection is not None
    placement = result.selection.placement
    assert placement is not None
    copies = sum(p.numel() * 4 for n, p in lora(layers=LAYERS["bert"]).named_parameters() if "lora_" in n)
    gates = 8 * result.selection.n
    assert warm == placement["warmup_total"] - copies - gates
    assert 0.97 * placement["total"] <= final <= placement["total"]


def test_an_impossible_budget_is_refused_with_the_smallest_that_works(tmp_path: Path) -> None:
    each = made(tmp_path)
    before = adapter_state(each.model)
    with pytest.raises(BudgetError, match="memory=9KiB is too little") as caught:
        fit(each, WeightLoRA(memory="9KiB", select_after=4))
    assert f"takes {caught.value.smallest} bytes (" in str(caught.value)
    assert max_difference(before, adapter_state(each.model)) == 0
    assert each.state.global_step == 0
    with pytest.raises(BudgetError):
        fit(made(tmp_path), WeightLoRA(memory=caught.value.smallest - 1, select_after=4))
    assert fit(made(tmp_path), WeightLoRA(memory=caught.value.smallest, select_after=4), measure=False).selection
    leaner = re.search(r"or (\d+) bytes \(.*\) with gradient_checkpointing", str(caught.value))
    if leaner is not None:
        assert int(leaner[1]) < caught.value.smallest


@pytest.mark.parametrize("share", ["0.95x", "0.7x"])
@pytest.mark.parametrize("method", [WeightLoRA, WeightLoRAPlus])
def test_a_step_after_the_seam_takes_its_share_of_operations(share: str, method: Any, tmp_path: Path) -> None:
    # Rows of one length, so that every batch costs the same.
    each = trainer(tmp_path, lora(layers=LAYERS["bert"]))
    result = fit(each, method(step_time=share, select_after=4))
    first, last = (phase.flops_per_step or 0 for phase in result.phases)
    assert last <= float(share[:-1]) * first
    assert result.selection is not None
    placement = result.selection.placement
    assert placement is not None
    assert last <= placement["total"] <= placement["budget"]
    if method is WeightLoRA:
        # In a model of width 16 what is counted too much (the lowest adapter's gradient to its input) is not little.
        assert last >= 0.94 * placement["total"]
    assert "operations a step" in result.selection.why


def test_a_share_of_time_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"step_time=0.1x is too little: the smallest placement takes 0\.\d+x"):
        fit(trainer(tmp_path, lora(layers=LAYERS["bert"])), WeightLoRA(step_time="0.1x", select_after=4))


@pytest.mark.parametrize("stop", [2, *long(4), 6])
def test_a_killed_run_goes_on_to_the_same_end(stop: int, tmp_path: Path) -> None:
    most, least = whole()
    method = WeightLoRA(memory=(most + least) // 2, select_after=4)
    expected, _ = run(tmp_path / "whole", method, measure=False)

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    each = made(tmp_path / "killed", save_strategy="steps", save_steps=1)
    each.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        fit(each, method, measure=False)
    again = made(tmp_path / "killed", save_strategy="steps", save_steps=1)
    result = fit(again, method, resume=True, measure=False)
    assert result.selection == expected.selection
    assert [p.micro_batch for p in result.phases] == [p.micro_batch for p in expected.phases]
    assert max_difference(adapter_state(result.model), adapter_state(expected.model)) == 0
    assert (result.selection.placement or {})["budget"] == method.memory  # type: ignore[union-attr]


def test_the_placement_is_part_of_the_manifest(tmp_path: Path) -> None:
    most, _ = whole()
    result, _ = run(
        tmp_path / "run",
        WeightLoRA(memory=most, select_after=4),
        measure=False,
        save_strategy="steps",
        save_steps=STEPS,
    )
    assert result.selection is not None
    manifest, _ = Manifest.read(tmp_path / "run" / f"checkpoint-{STEPS}")
    assert manifest.selection == result.selection
    assert type(result.selection).from_json(result.selection.to_json()) == result.selection


def test_omegas_are_importances_too(tmp_path: Path) -> None:
    most, least = whole()
    method = WeightLoRA.from_preset("paper", memory=(most + 3 * least) // 4, select_after=4)
    result, ledger = run(tmp_path / "run", method)
    assert result.selection is not None
    assert all(choice.omega > 0 for choice in result.selection.kept)
    assert max(spent(result, ledger)) <= (most + 3 * least) // 4


def all_kept(out: Path) -> int:
    """What backward keeps of a micro-batch with all adapters, as autograd counts it."""
    phase = fit(made(out), WeightLoRA(k=1.0, select_after=4)).phases[0]
    assert phase.kept_activation_bytes is not None
    return phase.kept_activation_bytes


@pytest.mark.parametrize("share", ["0.6x", "0.8x"])
def test_backward_keeps_its_share_in_both_phases(share: str, tmp_path: Path) -> None:
    limit = float(share[:-1]) * all_kept(tmp_path / "all")
    result, ledger = run(tmp_path / "run", WeightLoRA(kept=share, select_after=4, score="cross-gradient"))
    selection = result.selection
    assert selection is not None
    assert selection.placement is not None
    assert selection.placement["kind"] == "kept"
    kept = [phase.kept_activation_bytes for phase in result.phases]
    assert all(size is not None and size <= limit for size in kept)
    assert max(size or 0 for size in kept) <= selection.placement["budget"] <= limit
    assert selection.placement["warmup_total"] <= selection.placement["budget"]
    # Warm-up may take a smaller micro-batch; what follows has the one that was asked for.
    assert ledger.micro[4] == selection.placement["warmup_micro_batch"]
    assert ledger.micro[4] < BATCH or share == "0.8x"
    assert ledger.micro[STEPS] == BATCH


def test_a_share_of_what_is_kept_that_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"kept=0\.01x is too little: the smallest placement keeps 0"):
        run(tmp_path, WeightLoRA(kept="0.01x", select_after=4))


def test_the_smallest_set_that_holds_a_share_of_the_score(tmp_path: Path) -> None:
    result, _ = run(tmp_path, WeightLoRA(share=0.7, select_after=4, score="gradient"))
    assert result.selection is not None
    scores = [choice.score or 0.0 for choice in result.selection.choices]
    kept = [choice.score or 0.0 for choice in result.selection.kept]
    assert sum(kept) >= 0.7 * sum(scores) > sum(kept) - min(kept)
    assert sorted(scores, reverse=True)[: len(kept)] == sorted(kept, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 3, "memory": "1GiB"}, "k and memory both say"),
        ({"share": 0.9, "kept": "0.5x"}, "kept and share both say"),
        ({"share": 1.5}, "share=1.5 is not allowed; use a share of the total score"),
        ({"kept": "half"}, "'half' is not a share"),
        ({"memory": "1GiB", "step_time": "0.5x"}, "memory and step_time both say"),
        ({"memory": "much"}, "'much' is not a number of bytes"),
        ({"memory": 0}, "0 is not a number of bytes"),
        ({"step_time": "0.5"}, "'0.5' is not a share"),
        ({"step_time": "2x"}, "'2x' is not a share"),
        (
            {"memory": "1GiB", "coverage": True},
            "coverage=True spreads a number of adapters, and memory gives no number",
        ),
        ({"memory": "1GiB", "select_after": None}, "makes no choice; give select_after"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        WeightLoRA(**settings)


def test_six_tenths_of_what_all_adapters_keep_is_the_default(tmp_path: Path) -> None:
    assert (WeightLoRA().k, WeightLoRA(memory="1GiB").k) == (None, None)
    for method in (WeightLoRA(preset="paper"), WeightLoRA(score="omega"), WeightLoRA(coverage=True)):
        assert (method.k, method.limit) == (0.25, None)
    limit = 0.6 * all_kept(tmp_path / "all")
    result, _ = run(tmp_path / "run", WeightLoRA(select_after=4))
    assert all((phase.kept_activation_bytes or 0) <= limit for phase in result.phases)
    assert WeightLoRA().within(10**6, [(4, 4)] * 2, 8)[0].k == 2


def test_where_nothing_can_be_counted_the_default_is_a_quarter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    each = made(tmp_path)
    each.__class__ = Own
    with caplog.at_level("INFO", logger="weightlora"):
        result = fit(each, WeightLoRA(select_after=4))
    assert result.selection is not None
    assert result.selection.k == 3 == round(result.selection.n / 4)
    assert "not of what backward keeps, which is not counted" in caplog.text


def test_a_budget_of_parameters_goes_with_no_other() -> None:
    with pytest.raises(ConfigError, match="params and memory both say"):
        WeightLoRA(memory="1GiB").within(1000, [(4, 4)], 8)


def test_a_plain_loop_has_no_batches_to_count_on() -> None:
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ScheduleError, match="memory has to be counted on the run's batches"):
        attach(model, WeightLoRA(memory="1GiB", select_after=2), optimizer)


def test_gradient_checkpointing_is_counted(tmp_path: Path) -> None:
    arguments = recomputing(use_reentrant=False)
    plain, _ = whole()
    planned = allow(made(tmp_path, **arguments), WeightLoRA(memory="1TiB"), (None, None)).budget
    assert isinstance(planned, Budget)
    assert planned.facts["warmup_total"] < plain
    method = WeightLoRA(memory=int(planned.facts["warmup_total"]), select_after=4)
    result, ledger = run(tmp_path / "run", method, **arguments)
    assert max(spent(result, ledger)) <= planned.facts["warmup_total"]

"""What a run said before its first step, against what it counted in each phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import FAMILIES, LENGTH, VOCABULARY, lora, recomputing, trainer
from torch import Tensor

from weightlora.cost.measure import isolated_rng
from weightlora.methods import LoRA, MELoRA, Method, RandomAdapters, WeightLoRA, WeightLoRAPlus
from weightlora.training import FitResult, fit


def check(result: FitResult) -> None:
    """Every phase that ran was predicted, to the byte and to the number."""
    assert [phase.name for phase in result.phases] == list(result.predicted)
    for phase in result.phases:
        said = result.predicted[phase.name]
        assert said == {
            "kept_activation_bytes": phase.kept_activation_bytes,
            "trainable_params": phase.trainable_params,
        }


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest row."""
    length = max(len(row["input_ids"]) for row in rows)
    keys = ("input_ids", "attention_mask")
    batch = {key: torch.tensor([row[key] + [0] * (length - len(row[key])) for row in rows]) for key in keys}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


METHODS: dict[str, Method] = {
    "weightlora": WeightLoRA(k=2, select_after=4),
    "paper": WeightLoRA(k=2, select_after=4, score="omega", gate_lr=0.1, project_every=1),
    "grown": WeightLoRAPlus(k=2, select_after=4),
    "random": RandomAdapters(k=3, seed=1),
    "all": LoRA(),
}


@pytest.mark.parametrize("kind", METHODS)
def test_every_phase_is_predicted(tmp_path: Path, kind: str) -> None:
    check(fit(trainer(tmp_path, lora("bert"), steps=8), METHODS[kind]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_checkpointing(tmp_path: Path, family: str) -> None:
    made = trainer(tmp_path, lora(family), steps=6, **recomputing())
    check(fit(made, WeightLoRA(k=2, select_after=3)))


@pytest.mark.parametrize("arguments", [{"bf16": True}, recomputing(use_reentrant=True)])
def test_arguments_of_the_trainer(tmp_path: Path, arguments: dict[str, Any]) -> None:
    made = trainer(tmp_path, lora("llama"), steps=6, **arguments)
    check(fit(made, WeightLoRA(k=2, select_after=3)))


@pytest.mark.parametrize("path", ["stock", "reference"])
def test_other_engines(tmp_path: Path, path: Any) -> None:
    check(fit(trainer(tmp_path, lora("bert"), steps=6), RandomAdapters(k=2, seed=0), engine=path))


def test_another_micro_batch_after_the_seam(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora("bert"), steps=6, per_device_train_batch_size=8)
    result = fit(made, WeightLoRA(k=1, select_after=3), micro_batch=2, final_micro_batch=8)
    assert [phase.micro_batch for phase in result.phases] == [2, 8]
    check(result)


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    """The prediction is for the very batch that is counted."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(32):
        length = int(torch.randint(3, LENGTH + 12, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": index % 2})
    made = trainer(tmp_path, lora("bert"), steps=6, data=rows)
    made.data_collator = padded
    check(fit(made, WeightLoRA(k=1, select_after=3)))


def test_a_run_with_a_prediction_is_the_run_without(tmp_path: Path) -> None:
    found = []
    for measure in (True, False):
        with isolated_rng():
            torch.manual_seed(0)
            result = fit(trainer(tmp_path / str(measure), lora("bert"), steps=6), LoRA(), measure=measure)
            found.append({k: v.clone() for k, v in result.model.state_dict().items() if "lora_" in k})
        assert bool(result.predicted) is measure
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_form_of_its_own_is_not_predicted(tmp_path: Path) -> None:
    assert fit(trainer(tmp_path, lora("bert"), steps=4), MELoRA()).predicted == {}


def test_the_frontier_is_what_runs_with_the_best_k_hold_and_keep(tmp_path: Path) -> None:
    def method(k: int) -> WeightLoRA:
        return WeightLoRA(k=k, select_after=3, score="gradient")

    first = fit(trainer(tmp_path / "one", lora(dropout=0.0)), method(1))
    points = {point.k: point for point in first.frontier}
    assert first.selection is not None
    n = first.selection.n
    assert sorted(points)[0] == 1
    assert sorted(points)[-1] == n
    for k in (1, 2, n):
        run = fit(trainer(tmp_path / str(k), lora(dropout=0.0)), method(k))
        assert run.selection is not None
        scores = [choice.score or 0.0 for choice in run.selection.choices]
        held = sum(choice.score or 0.0 for choice in run.selection.kept)
        assert points[k].share == pytest.approx(held / sum(scores))
        assert points[k].kept_activation_bytes == run.phases[-1].kept_activation_bytes
        # What the lowest block passes down in vain is counted, too: a good part of a model of two blocks.
        counted, said = run.phases[-1].flops_per_step, points[k].flops_per_step
        assert counted is not None
        assert said is not None
        assert counted <= said <= 1.1 * counted


def test_no_frontier_without_scores(tmp_path: Path) -> None:
    assert fit(trainer(tmp_path), RandomAdapters(k=2)).frontier == ()

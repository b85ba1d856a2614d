"""Modes of the trainer through the seam: each against the stock trainer, or refused before the first step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, examples, lora, max_difference, recomputing, trainer, warm
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.methods import Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import fit

TWO = WeightLoRA(k=2, select_after=5)


class Stream(IterableDataset[dict[str, Any]]):
    """Rows that begin anew with every iterator, and have no length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def uneven(count: int) -> list[dict[str, Any]]:
    """Rows of 3 to 8 tokens."""
    rows = examples(count)
    return [{**row, **{k: row[k][: 3 + i % 6] for k in ("input_ids", "attention_mask")}} for i, row in enumerate(rows)]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    columns = {key: [torch.as_tensor(row[key]) for row in rows] for key in ("input_ids", "attention_mask")}
    made = {key: torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for key, column in columns.items()}
    return {**made, "labels": torch.tensor([row["labels"] for row in rows])}


def made(out: Path, mode: str) -> Trainer:
    """A trainer in one of the modes."""
    if mode == "streaming":
        return trainer(out, data=Stream(examples(32)), logging_steps=1)
    if mode == "group_by_length":
        each = trainer(out, data=uneven(32), logging_steps=1, train_sampling_strategy="group_by_length")
        each.data_collator = padded
        return each
    settings: dict[str, dict[str, Any]] = {
        "label_smoothing": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
        "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
        "bf16": {"bf16": True},
        "reentrant": recomputing(use_reentrant=True),
    }
    return trainer(out, logging_steps=1, **settings[mode])


def entries(each: Trainer, *keys: str) -> list[tuple[Any, ...]]:
    """The logged numbers, with their steps."""
    return [(x["step"], key, x[key]) for x in each.state.log_history for key in keys if key in x]


@pytest.mark.parametrize(
    "mode", ["label_smoothing", "eval_on_start", "bf16", "reentrant", "group_by_length", "streaming"]
)
def test_a_mode_is_the_stock_trainers_to_the_bit(mode: str, tmp_path: Path) -> None:
    plain = made(tmp_path / "a", mode)
    plain.train()
    ours = made(tmp_path / "b", mode)
    fit(ours, WeightLoRA(k=1.0, select_after=5), engine="stock", measure=mode == "streaming")
    assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) == 0.0
    for key in ("loss", "eval_loss", "grad_norm"):
        assert entries(ours, key) == entries(plain, key)
    # And the mode is on: the same run without it learns something else.
    if mode in ("label_smoothing", "bf16", "group_by_length"):
        other = made(tmp_path / "c", "eval_on_start")
        other.train()
        assert max_difference(adapter_state(plain.model), adapter_state(other.model)) > 1e-4


@pytest.mark.parametrize("mode", ["label_smoothing", "streaming"])
def test_survivors_of_a_mode_are_those_of_a_run_that_was_cut(mode: str, tmp_path: Path) -> None:
    """Resumed in a new process from the seam: the same batches and the same loss are found again."""
    whole = made(tmp_path / "a", mode)
    result = fit(whole, TWO, measure=False)
    again = made(tmp_path / "b", mode)
    resumed = fit(again, TWO, resume=tmp_path / "a" / "seam-5", measure=False)
    assert resumed.selection == result.selection
    assert max_difference(adapter_state(whole.model), adapter_state(again.model)) == 0.0


# early stopping


def stopping(out: Path, **arguments: Any) -> Trainer:
    """Stops at the second evaluation of a phase: a falling loss counts as getting worse."""
    settings = {"metric_for_best_model": "loss", "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1,
                "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "optim": "sgd",
                "learning_rate": 1e-3}  # fmt: skip
    each = trainer(out, **{**settings, **arguments})
    each.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    return each


def losses(each: Trainer) -> list[float]:
    return [loss for _, _, loss in entries(each, "eval_loss")]


def test_early_stopping_after_the_seam(tmp_path: Path) -> None:
    each = stopping(tmp_path)
    result = fit(each, WeightLoRA(k=2, select_after=1), measure=False)
    assert losses(each) == sorted(losses(each), reverse=True)
    assert len(losses(each)) == each.state.global_step == 3
    assert [p.steps for p in result.phases] == [1, 2]
    # The best after the seam is the first after it, and it is loaded.
    assert each.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert each.evaluate()["eval_loss"] == pytest.approx(losses(each)[1], rel=1e-6)
    assert len(adapters(each.model)) == 2


def test_early_stopping_before_the_seam_says_so(tmp_path: Path) -> None:
    each = stopping(tmp_path)
    with pytest.raises(ScheduleError, match=r"training stopped at step 2, before the seam at 5; .*early stopping"):
        fit(each, TWO)
    assert len(adapters(each.model)) == 6


# refused


def test_what_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def refused(each: Trainer, message: str) -> None:
        before = adapter_state(each.model)
        with pytest.raises(ConfigError, match=message):
            fit(each, TWO)
        assert max_difference(adapter_state(each.model), before) == 0.0
        assert not list(Path(str(each.args.output_dir)).glob("*"))

    refused(trainer(tmp_path, auto_find_batch_size=True), "auto_find_batch_size begins training anew .* set it to Fa")
    scaled = trainer(tmp_path)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu")  # what fp16=True makes on a GPU
    refused(scaled, "fp16 training scales the gradients that gates and scores are computed from; use bf16")
    refused(trainer(tmp_path, data=Once(examples(8))), "train_dataset is an iterator, .* starts at the beginning")


class Once(Stream):
    """Rows that can be read once."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.left = iter(rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self.left)


# torch.compile


class Compiled(TrainerCallback):
    """How many graphs were made by the end of every step, and whether the model that ran is a compiled one."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    logging.disable(logging.DEBUG)  # the compiler's trace, of which nobody reads a line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_torch_compile_compiles_once_more_at_the_seam(tmp_path: Path) -> None:
    """With gates before the seam and growth at it."""
    method: Method = WeightLoRAPlus.from_preset("paper", k=1, select_after=3)
    runs = []
    for name, arguments in (
        ("a", {}),
        ("b", {"torch_compile": True, "torch_compile_backend": "eager"}),
    ):
        model = warm(lora(layers=1, dropout=0.0))
        model.base_model.model.config.problem_type = "single_label_classification"  # BERT sets it in its first step
        each = trainer(tmp_path / name, model, steps=6, optim="sgd", **arguments)
        each.add_callback(spy := Compiled())
        runs.append((each, fit(each, method, engine="autograd", measure=False), spy.graphs))
    (plain, wanted, none), (ours, result, graphs) = runs
    assert result.selection is not None
    assert wanted.selection is not None
    assert none == [0] * 6
    assert graphs == [1, 1, 1, 2, 2, 2]
    assert isinstance(ours.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert result.selection.names == wanted.selection.names
    assert [c.rank for c in result.selection.kept] == [12]  # three adapters' parameters on one
    assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) < 1e-5

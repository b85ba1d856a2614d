"""NaN and infinity stop a run before they reach a selection or a checkpoint, with the step at which they came."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import batches, examples, lora, trainer

from weightlora.errors import DivergedError
from weightlora.methods import LoRA, Method, WeightLoRA, method
from weightlora.training import attach, fit
from weightlora.training.checkpoint import folders, latest
from weightlora.training.finite import FiniteWatch

FOUND = re.compile(r"NaN or infinite at step (\d+); try a lower learning rate")


class Poisoned(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a regression in order; the label of one is NaN, as a broken file has it."""

    def __init__(self, bad: int, count: int = 64) -> None:
        self.rows: list[dict[str, Any]] = [{**row, "labels": float(row["labels"])} for row in examples(count)]
        self.rows[bad]["labels"] = math.nan

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def regression() -> Any:
    model: Any = lora()
    model.config.problem_type = "regression"
    model.config.num_labels = model.base_model.model.num_labels = 1
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.weight = torch.nn.Parameter(head.weight[:1].detach().clone())
    head.bias = torch.nn.Parameter(head.bias[:1].detach().clone())
    return model


METHODS: dict[str, Method] = {
    "credit": WeightLoRA(k=2, select_after=8),
    "gates": WeightLoRA.from_preset("paper", k=2, select_after=8),
    "lora": LoRA(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [5, 10], ids=["warmup", "final"])
def test_one_broken_label_stops_the_run_where_it_came(name: str, bad: int, tmp_path: Path) -> None:
    """Row 4 (bad - 1) is the first of step `bad`: rows come in order, four to a step."""
    made = trainer(
        tmp_path, regression(), data=Poisoned(4 * (bad - 1)), steps=12, logging_steps=3, save_strategy="steps",
        save_steps=3, train_sampling_strategy="sequential",
    )  # fmt: skip
    with pytest.raises(DivergedError) as caught:
        fit(made, METHODS[name], measure=False)
    assert caught.value.step == bad
    found = FOUND.search(str(caught.value))
    assert found is not None
    assert int(found[1]) == bad
    assert "\n" not in str(caught.value)
    good = latest(tmp_path)
    assert str(caught.value).endswith(f"the last good checkpoint is {good}")
    assert made.state.global_step - bad < 3, "it went on beyond the next step that logs"
    for folder in folders(tmp_path):
        assert int(folder.name.rsplit("-", 1)[1]) < bad


@pytest.mark.parametrize("kind", ["weightlora", "full"])
def test_a_huge_learning_rate(kind: str, tmp_path: Path) -> None:
    from tests.builders import base

    chosen = WeightLoRA(k=2, select_after=5) if kind == "weightlora" else method("full")
    made = trainer(
        tmp_path, lora() if kind == "weightlora" else base("bert"), learning_rate=1e38, max_grad_norm=0.0,
        logging_steps=50, optim="sgd",
    )  # fmt: skip
    with pytest.raises(DivergedError, match="there is no checkpoint from before") as caught:
        fit(made, chosen, measure=False)
    assert caught.value.step is not None
    assert made.train_dataset is not None
    assert not [c for c in made.callback_handler.callbacks if type(c).__module__.startswith("weightlora")]


@pytest.mark.parametrize("seam", [6, 50])
def test_a_plain_loop(seam: int) -> None:
    """At the seam, or at the next step that looks; in `state_dict` at once."""
    model = lora(dropout=0.0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tuner = attach(model, WeightLoRA(k=2, select_after=seam), optimizer)
    reached: list[int] = []

    def run() -> None:
        for step, batch in zip(range(1, 12), batches(), strict=False):
            reached.append(step)
            loss = model(**batch).loss * (math.inf if step == 4 else 1.0)
            loss.backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
            if step == 4:
                with pytest.raises(DivergedError, match="at step 4;"):
                    tuner.state_dict()

    with pytest.raises(DivergedError, match="at step 4;") as caught:
        run()
    assert reached[-1] == min(seam, 10)
    assert tuner.selection is None
    assert caught.value.step == 4


def test_the_first_bad_step_is_kept_and_large_gradients_are_good() -> None:
    layer = torch.nn.Linear(2, 1)
    watch = FiniteWatch(layer)
    for step, value in enumerate([1.0, 3e38, math.nan, 1.0, math.inf], start=1):
        layer.weight.grad = torch.full((1, 2), value)
        watch.see(step)
        assert watch.first() == (None if step < 3 else 3)

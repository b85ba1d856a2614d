"""Targets of a regression are standardised for training, and every model that is saved answers in the user's units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.builders import long
from tests.runs.commands import TINY, read, weightlora, write_rows
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, EvalPrediction

from weightlora.errors import DataError
from weightlora.tasks import load_model, load_task
from weightlora.tasks.metrics import regression
from weightlora.tasks.targets import CONFIG_KEY, Targets

STEPS = 10
SHIFT, SCALE = 1000.0, 50.0
WORDS = ("poor", "fair", "good", "great", "superb")
ROWS = [{"text": f"{WORDS[i % 5]} film number {i}", "label": 2.0 + i % 5 + (i % 3) / 4} for i in range(60)]


def moved() -> list[dict[str, Any]]:
    return [{**row, "label": SHIFT + SCALE * float(row["label"])} for row in ROWS]


def train(folder: Path, rows: list[dict[str, Any]], *flags: object, model: str = "bert-tiny-shape") -> Path:
    path = write_rows(folder.with_suffix(".jsonl"), rows)
    tiny = [model if word == TINY[1] else word for word in TINY]
    run = ("--regression", "--train-file", path, "--max-steps", STEPS, "--learning-rate", "5e-3", "--dropout", "0")
    assert weightlora("train", "--task", "files", *tiny, *run, *flags, "--out", folder) == 0
    return folder


def opened(run: Path, model: str = "bert-tiny-shape") -> nn.Module:
    """The saved model, by the libraries alone."""
    if (run / "model").is_dir():
        return AutoModelForSequenceClassification.from_pretrained(run / "model")
    base = load_model(model, num_labels=1, regression=True).model
    return PeftModel.from_pretrained(base, run / "adapter")


def answers(model: nn.Module) -> Tensor:
    tokenizer = load_model("bert-tiny-shape", num_labels=1, regression=True).tokenizer
    inputs = tokenizer([row["text"] for row in ROWS], padding=True, max_length=24, truncation=True, return_tensors="pt")
    inputs.pop("token_type_ids")
    with torch.no_grad():
        return model.eval()(**inputs).logits.squeeze(-1).double()


@pytest.mark.parametrize("method", [*long("lora"), "weightlora", "full", *long("vera")])
def test_a_saved_model_answers_in_the_units_of_its_file(method: str, tmp_path: Path) -> None:
    """The same texts with targets that are shifted and scaled: the same answers up to that shift and scale."""
    flags = ["--method", method, *(["--k", "2", "--select-after", "2"] if method == "weightlora" else [])]
    own, other = train(tmp_path / "own", ROWS, *flags), train(tmp_path / "other", moved(), *flags)
    plain, far = answers(opened(own)), answers(opened(other))
    assert abs(float(plain.mean()) - 4.2) < 1.0, "a new head starts at the mean of the targets"
    spread = float(plain.std())
    assert spread > 1e-4, "it tells texts apart"
    torch.testing.assert_close(far, SHIFT + SCALE * plain, atol=0.2 * SCALE * spread, rtol=0)
    records = [read(run / "record.json")["metrics"] for run in (own, other)]
    assert records[1]["pearson"] == pytest.approx(records[0]["pearson"], abs=1e-4)
    assert records[1]["mse"] == pytest.approx(SCALE**2 * records[0]["mse"], rel=1e-3)
    assert records[1]["eval_loss"] == pytest.approx(records[0]["eval_loss"], rel=1e-3)  # in units of the spread


def test_exported_and_resumed_models_answer_alike(tmp_path: Path) -> None:
    flags = ("--method", "weightlora", "--k", "2", "--select-after", "2", "--save-steps", "5")
    run = train(tmp_path / "run", ROWS, *flags)
    plain = answers(opened(run))
    assert weightlora("export", run, "--profile", "merged", "--out", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(merged), plain, atol=1e-5, rtol=0)
    said = getattr(merged.config, CONFIG_KEY)
    targets = [row["label"] for row in ROWS]
    assert said["folded"] is True
    assert said["mean"] == pytest.approx(np.mean(targets), abs=0.1)  # of the rows that were not held out
    # As a process leaves a run that dies between training and its record.
    record = read(run / "record.json")
    (run / "record.json").unlink()
    assert weightlora("resume", run) == 0
    torch.testing.assert_close(answers(opened(run)), plain, atol=0, rtol=0)
    assert read(run / "record.json")["metrics"] == record["metrics"]


def test_a_head_without_a_bias_is_scaled_alone(tmp_path: Path) -> None:
    """Llama's head has none, so that no shift can be folded into it."""
    loaded = load_model("llama-small-shape", num_labels=1, regression=True)
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    task: Any = load_task("files", train_file=path, regression=True, holdout=0.25)
    targets = task.targets(loaded)
    labels = np.array(task.train["label"])
    assert (targets.head, targets.mean) == ("score", 0.0)
    assert targets.std == pytest.approx(np.sqrt(np.mean(labels**2)))
    head: Any = loaded.model.get_submodule("score")
    before = head.weight.clone()
    targets.fold(head, loaded.model.config)
    torch.testing.assert_close(head.weight, before * targets.std)


def test_standardised_and_back() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    targets = Targets.of([1.0, 2.0, 6.0], "2", bias=True)
    standard = targets.standard([1.0, 2.0, 6.0])
    assert np.mean(standard) == pytest.approx(0)
    assert np.std(standard) == pytest.approx(1)
    assert targets.own(standard) == pytest.approx([1.0, 2.0, 6.0])
    given = np.array([[0.3], [-1.0], [0.5]])
    judged = targets.judge(regression)(EvalPrediction(predictions=(given, given), label_ids=np.array(standard)))
    direct = EvalPrediction(predictions=targets.own(given), label_ids=np.array([1.0, 2.0, 6.0]))
    assert judged == pytest.approx(regression(direct))
    x = torch.randn(5, 3)
    before = net(x).detach()
    targets.fold(net[2], config := type("Config", (), {})())  # type: ignore[arg-type]
    torch.testing.assert_close(net(x), before * targets.std + targets.mean)
    assert getattr(config, CONFIG_KEY)["folded"] is True


def test_targets_that_are_all_equal_are_refused() -> None:
    with pytest.raises(DataError, match="all training targets are 3; a regression needs at least two different ones"):
        Targets.of([3.0, 3.0], "classifier", bias=True)

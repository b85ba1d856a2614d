"""Summarization: ROUGE by a second implementation, tokens, beams, and what is wrong with rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchmetrics.functional.text.rouge import rouge_score
from transformers import EvalPrediction

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import LoadedModel, load_model, load_task, text_metrics
from weightlora.tasks.evaluation import SummaryTrainer


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("bart-small-shape", head="seq2seq-lm")


@pytest.mark.parametrize(
    ("name", "columns"), [("xsum", ("document", "summary")), ("cnn_dailymail", ("article", "highlights"))]
)
def test_rouge_is_that_of_torchmetrics_on_real_summaries(data_dir: Path, name: str, columns: tuple[str, str]) -> None:
    """The first sentences of a text as its summary: a hard baseline, for news."""
    rows = load_task(name, data_dir=data_dir, max_train_samples=1, max_eval_samples=60).validation
    guesses = [". ".join(text.split(". ")[:3]) for text in rows[columns[0]]]
    truths = list(rows[columns[1]])
    found = text_metrics.rouge(guesses, truths)
    theirs = rouge_score(guesses, truths, use_stemmer=True, rouge_keys=("rouge1", "rouge2", "rougeL"))
    assert found == pytest.approx({kind: float(theirs[f"{kind}_fmeasure"]) for kind in found}, abs=1e-6)
    assert 0 < found["rouge2"] < found["rougeL"] < found["rouge1"] < 1


def test_prepared_rows_references_and_beams(data_dir: Path, loaded: LoadedModel) -> None:
    task = load_task("xsum", data_dir=data_dir, max_train_samples=8, max_eval_samples=6, max_target_length=28)
    parts = task.prepare(loaded, 50)
    assert parts.trainer is SummaryTrainer
    assert (parts.training["generation_num_beams"], parts.training["generation_max_length"]) == (8, 28)
    for row, source in zip(parts.train, task.train, strict=True):
        assert row["input_ids"] == loaded.tokenizer(source["document"], truncation=True, max_length=50)["input_ids"]
        assert row["labels"] == loaded.tokenizer(source["summary"], truncation=True, max_length=28)["input_ids"]
    batch = parts.collator([parts.train[i] for i in range(4)])
    assert (batch["labels"] == -100).any()
    assert batch["decoder_input_ids"][0, 0] == loaded.model.config.decoder_start_token_id
    # Judged against the whole summaries, not the 28 tokens that were kept of them.
    whole = loaded.tokenizer(list(task.validation["summary"]), padding=True, return_tensors="np")["input_ids"]
    guesses = np.where(whole == 0, -100, whole)
    scores = np.ones((len(guesses), 3))
    metrics = parts.compute_metrics(EvalPrediction(predictions=(guesses, scores), label_ids=guesses))
    assert metrics["rouge1"] == pytest.approx(1.0)
    half = parts.compute_metrics(EvalPrediction(predictions=(guesses[:, :8], scores), label_ids=guesses))
    assert 0.2 < half["rouge1"] < 0.8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"document": "text"},
            "no column 'summary'; there are: 'document'; task 'xsum' needs the columns document, summary",
        ),
        ({"document": "text", "summary": " \n"}, "column 'summary' is empty"),
        ({"document": ["text"], "summary": "s"}, "column 'document' holds"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "xsum").mkdir()
    good = {"document": "", "summary": "A few real texts are empty."}
    for split in ("train", "validation"):
        text = json.dumps(good) + "\n" + json.dumps(row) + "\n"
        (tmp_path / "xsum" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_task("xsum", data_dir=tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/xsum/train.jsonl:2: {message}")


def test_settings_and_folders_that_cannot_be(data_dir: Path, tmp_path: Path, loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="max_target_length=2"):
        load_task("xsum", data_dir=data_dir, max_target_length=2)
    with pytest.raises(DataError, match=r"no such folder for task 'cnn_dailymail' in data_dir .*; add"):
        load_task("cnn_dailymail", data_dir=tmp_path)
    with pytest.raises(DataError, match="cannot be read from the hub's EdinburghNLP/xsum"):
        load_task("xsum")
    task = load_task("xsum", data_dir=data_dir, max_train_samples=2, max_eval_samples=2)
    with pytest.raises(ConfigError, match="max_length=2 leaves no room beside 2 special tokens"):
        task.prepare(loaded, 2)
    with pytest.raises(ConfigError, match="'bert-tiny-shape' has no seq2seq-lm head; pass bart-small-shape"):
        load_model("bert-tiny-shape", head="seq2seq-lm")
    with pytest.raises(ConfigError, match="'minilm' has no causal-lm head; pass llama-small-shape"):
        load_model("minilm", head="causal-lm")

"""Token ids against a direct call of the tokenizer, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from weightlora.errors import ConfigError
from weightlora.tasks import Classification, load_model, load_task, tokenize


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_model("bert-tiny-shape", num_labels=2).tokenizer


def direct(tokenizer: PreTrainedTokenizerBase, rows: Dataset, columns: tuple[str, ...], length: int) -> list[object]:
    return [
        dict(tokenizer(*(row[name] for name in columns), truncation="longest_first", max_length=length)) for row in rows
    ]


@pytest.mark.parametrize(("name", "length"), [("mrpc", 128), ("mrpc", 24), ("stsb", 32), ("cola", 8)])
def test_tokens_equal_a_direct_call(name: str, length: int, data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load_task(name, data_dir=data_dir, max_train_samples=40, max_eval_samples=20)
    parts = tokenize(task, tokenizer, length)
    for rows, tokens in zip((task.train, task.validation), parts, strict=True):
        labels = list(tokens["labels"])
        assert labels == pytest.approx(list(rows["label"]))
        assert type(labels[0]) is (float if task.is_regression else int)
        unlabelled = list(tokens.remove_columns("labels"))
        assert unlabelled == direct(tokenizer, rows, task.text_columns, length)
        assert max(len(row["input_ids"]) for row in unlabelled) <= length
        assert not tokens.cache_files
    if length < 30:
        assert max(map(len, parts[0]["input_ids"])) == length  # truncation did happen


def test_batches_are_padded_by_the_collator(data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train, _ = tokenize(load_task("stsb", data_dir=data_dir, max_train_samples=6), tokenizer)
    batch = DataCollatorWithPadding(tokenizer)([train[i] for i in range(6)])
    lengths = [len(ids) for ids in train["input_ids"]]
    assert batch["input_ids"].shape == (6, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"].dtype, batch["labels"].dtype) == (torch.int64, torch.float32)


def test_a_tokenizer_without_token_types_and_its_own_limit() -> None:
    tokenizer = load_model("llama-small-shape", num_labels=2).tokenizer
    rows = Dataset.from_dict({"text": ["word " * 900], "label": [1]})
    task = Classification(
        name="t",
        train=rows,
        validation=rows,
        text_columns=("text",),
        labels=("a", "b"),
        metric="m",
        compute_metrics=lambda prediction: {},
    )
    train, _ = tokenize(task, tokenizer, max_length=4096)
    assert sorted(train.column_names) == ["attention_mask", "input_ids", "labels"]
    assert len(train[0]["input_ids"]) == tokenizer.model_max_length == 512
    with pytest.raises(ConfigError, match="max_length=2 leaves no room beside 2 special tokens"):
        tokenize(task, tokenizer, max_length=2)

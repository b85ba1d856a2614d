"""Summarization, XSum and CNN/DailyMail: a text in, a generated summary out, judged by ROUGE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from weightlora.errors import ConfigError
from weightlora.tasks import text_metrics
from weightlora.tasks.evaluation import SummaryTrainer, mean_loss
from weightlora.tasks.files import Table, read_texts
from weightlora.tasks.models import LoadedModel
from weightlora.tasks.task import Head, Prepared, Task

NUM_BEAMS = 8
SUMMARIES = {"xsum": ("document", "summary"), "cnn_dailymail": ("article", "highlights")}


@dataclass(frozen=True, kw_only=True)
class Summarization(Task):
    """Write the summary of a text.

    Args:
        text_column: the text.
        summary_column: its summary.
        max_target_length: the most tokens in a summary, special tokens included, in training and, unless
            ``generation_max_length`` says otherwise, in evaluation.

    The paper names no lengths and no beams; the defaults (256 tokens in, 160 out, 8 beams) are those of its authors'
    script for XSum.
    """

    head: ClassVar[Head] = "seq2seq-lm"

    text_column: str
    summary_column: str
    max_target_length: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_target_length < 3:
            raise ConfigError(f"max_target_length={self.max_target_length} leaves no room for text; use 3 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text_column, self.summary_column

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.text_column,)

    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        tokenizer = loaded.tokenizer
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= special:
            raise ConfigError(f"max_length={max_length} leaves no room beside {special} special tokens; give more")
        references = list(self.validation[self.summary_column])
        text_metrics.rouge(references[:1], references[:1])  # a missing package must show before training

        def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
            tokens, scores = prediction.predictions  # type: ignore[misc]  # as its trainer gives them
            texts = decode(tokenizer, tokens)[: len(references)]
            return {**text_metrics.rouge(texts, references), "loss": mean_loss(scores)}

        return Prepared(
            train=self._tokens(self.train, tokenizer, max_length),
            validation=self._tokens(self.validation, tokenizer, max_length),
            collator=DataCollatorForSeq2Seq(tokenizer, model=loaded.model),
            compute_metrics=compute_metrics,
            ordered=True,
            trainer=SummaryTrainer,
            training={
                "predict_with_generate": True,
                "generation_max_length": self.max_target_length,
                "generation_num_beams": NUM_BEAMS,
                "per_device_eval_batch_size": 8,
            },
        )

    def _tokens(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        source = tokenizer(
            list(rows[self.text_column]), truncation=True, max_length=min(max_length, tokenizer.model_max_length)
        )
        target = tokenizer(
            text_target=list(rows[self.summary_column]),
            truncation=True,
            max_length=min(self.max_target_length, tokenizer.model_max_length),
        )
        kept = {name: source[name] for name in ("input_ids", "attention_mask")}
        features = Features({"input_ids": Sequence(Value("int32")), "attention_mask": Sequence(Value("int8"))})
        features["labels"] = Sequence(Value("int64"))
        return Dataset.from_dict({**kept, "labels": target["input_ids"]}, features=features)


def read_summaries(table: Table, name: str) -> Dataset:
    """Check the rows of a summarization task; a text may be empty (a few of XSum are), a summary may not.

    Raises:
        DataError: a missing column, a value that is no text, an empty summary.
    """
    columns = SUMMARIES[name]
    remedy = f"task {name!r} needs the columns {', '.join(columns)}"
    texts = {column: read_texts(table, column, remedy) for column in columns}
    for row, summary in enumerate(texts[columns[1]]):
        if not summary.strip():
            raise table.error(row, f"column {columns[1]!r} is empty; write a summary or drop the row")
    return Dataset.from_dict(texts, features=Features({column: Value("string") for column in columns}))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray | tuple[np.ndarray, ...]) -> list[str]:
    """Generated token ids (rows, tokens), -100 where the trainer padded, as text."""
    ids = np.asarray(tokens[0] if isinstance(tokens, tuple) else tokens)
    padding = tokenizer.pad_token_id
    return list(tokenizer.batch_decode(np.where(ids == -100, padding, ids), skip_special_tokens=True))

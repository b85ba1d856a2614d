"""Classification by a language model's own words: a prompt from the row's texts, a word for each class.

Source: Brown et al. 2020 (GPT-3), section 2.4: likelihoods of the answers, per token where they differ in length.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from weightlora.errors import ConfigError
from weightlora.tasks.classification import Classification
from weightlora.tasks.completions import opening, token_dataset
from weightlora.tasks.evaluation import IGNORED, Logits, OwnLossTrainer, token_scores
from weightlora.tasks.models import LoadedModel
from weightlora.tasks.task import Head, Prepared
from weightlora.tasks.told import tell_once

if TYPE_CHECKING:
    from weightlora.tasks.metrics import Metric

SHOWN = 12
_NO_YES = ("no", "yes")
PROMPTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "cola": ("{sentence}\nGrammatical:", _NO_YES),
        "sst2": ("{sentence}\nSentiment:", ("negative", "positive")),
        "mrpc": ("{sentence1}\n{sentence2}\nSame meaning:", _NO_YES),
        "qqp": ("{question1}\n{question2}\nSame question:", _NO_YES),
        "mnli": ("{premise}\nQuestion: {hypothesis} True, false or neither?\nAnswer:", ("true", "neither", "false")),
        "qnli": ("{question}\n{sentence}\nAnswers the question:", ("yes", "no")),
        "rte": ("{sentence1}\nQuestion: {sentence2} True or false?\nAnswer:", ("true", "false")),
    }
)
"""Prompt and words, in the order of the classes, of the tasks whose column names and classes say too little."""


@dataclass(frozen=True, kw_only=True)
class AnswerTokens(Classification):
    """Classes as words that a causal model gives as its answer; the loss is on the tokens of the right word.

    The prediction is the class whose word has the highest log-probability, per token of the word.

    Args:
        prompt: a text with the columns' names in braces.
        words: what follows it, in the order of the classes; a blank is put before each.

    Raises:
        ConfigError: a prompt that names no column, or an unknown one; a number to predict.
    """

    head: ClassVar[Head] = "causal-lm"

    prompt: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_regression:
            raise ConfigError(f"task {self.name!r} predicts a number, which has no answer tokens; classify by head")
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None}
        except ValueError as error:
            raise ConfigError(
                f"prompt={self.prompt!r} is not a text with columns in braces, such as '{{sentence}}' ({error})"
            ) from None
        if not named or named - set(self.text_columns):
            there = ", ".join(f"{{{column}}}" for column in self.text_columns)
            raise ConfigError(f"prompt={self.prompt!r} must name columns of task {self.name!r}: {there}")

    @property
    def model_settings(self) -> dict[str, object]:
        return {"head": self.head}

    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        tokenizer = loaded.tokenizer
        answers = self._answers(tokenizer)
        length = min(max_length, tokenizer.model_max_length)
        train, validation = (self._prompts(rows, tokenizer, length, answers) for rows in (self.train, self.validation))
        labels = list(self.validation[self.label_column])
        single = all(len(answer) == 1 for answer in answers)
        # One pass says all about words of one token; longer ones are read one by one.
        judged = [[label] for label in labels] if single else [range(len(answers))] * len(labels)
        self._say(validation[0], answers, tokenizer)
        return Prepared(
            train=_rows(train, [[label] for label in self.train[self.label_column]], answers),
            validation=_rows(validation, judged, answers),
            collator=DataCollatorForSeq2Seq(tokenizer),
            compute_metrics=_Judge(labels, [len(answer) for answer in answers], self.compute_metrics),
            preprocess_logits=_NextWord([answer[0] for answer in answers]) if single else _per_token,
            ordered=True,
            trainer=OwnLossTrainer,
            training={"per_device_eval_batch_size": 16},
        )

    def _answers(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of each class's word, as they are at the end of a prompt."""
        end = self.prompt.rpartition("}")[2]
        blank = "" if self.prompt[-1].isspace() else " "
        start = tokenizer(end, add_special_tokens=False)["input_ids"]
        found: dict[tuple[int, ...], str] = {}
        for word in self.words:
            whole = tokenizer(f"{end}{blank}{word}", add_special_tokens=False)["input_ids"]
            follows = whole[: len(start)] == start
            apart = tokenizer(f"{blank}{word}", add_special_tokens=False)["input_ids"]
            tokens = tuple(whole[len(start) :] if follows else apart)
            if not tokens or tokenizer.unk_token_id in tokens:
                raise ConfigError(f"the tokenizer has no tokens for the word {word!r}; give another in label_words")
            if tokens in found:
                raise ConfigError(
                    f"the words {found[tokens]!r} and {word!r} are the same tokens, so their classes cannot be told"
                    " apart; give others in label_words"
                )
            found[tokens] = word
        return [list(tokens) for tokens in found]

    def _prompts(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, answers: list[list[int]]
    ) -> list[list[int]]:
        """Token ids of each row's prompt; texts that are too long are cut, the longest first."""
        before = opening(tokenizer)
        room = length - len(before) - max(map(len, answers))
        columns = [[text.strip() for text in rows[column]] for column in self.text_columns]
        texts = [dict(zip(self.text_columns, row, strict=True)) for row in zip(*columns, strict=True)]
        prompts = tokenizer([self.prompt.format(**row) for row in texts], add_special_tokens=False)["input_ids"]
        return [
            [*before, *(prompt if len(prompt) <= room else self._cut(row, tokenizer, room, length))]
            for prompt, row in zip(prompts, texts, strict=True)
        ]

    def _cut(self, row: dict[str, str], tokenizer: PreTrainedTokenizerBase, room: int, length: int) -> list[int]:
        used = {column: tokenizer(text, add_special_tokens=False)["input_ids"] for column, text in row.items()}
        while True:
            prompt: list[int] = tokenizer(self.prompt.format(**row), add_special_tokens=False)["input_ids"]
            over = len(prompt) - room
            if over <= 0:
                return prompt
            longest, *others = sorted(used, key=lambda column: -len(used[column]))
            level = max((len(used[other]) for other in others), default=0)
            used[longest] = used[longest][: -min(over, max(1, len(used[longest]) - level))]
            if not any(used.values()):
                raise ConfigError(f"max_length={length} leaves no room for a text in the prompt; give more")
            # The last token may be a part of a character.
            row = {**row, longest: str(tokenizer.decode(used[longest], skip_special_tokens=True)).rstrip("\ufffd")}

    def _say(self, prompt: list[int], answers: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        assert self.labels is not None
        described = [
            f"{label}: {tokenizer.decode(answer)!r} ({len(answer)} token{'s' * (len(answer) > 1)})"
            for label, answer in zip(self.labels, answers, strict=True)
        ]
        more = f"; and {len(described) - SHOWN} more" if len(described) > SHOWN else ""
        asked = f"classes are told by the model's answer to prompts such as: {tokenizer.decode(prompt)!r}"
        tell_once(logging.INFO, asked)
        tell_once(logging.INFO, f"answers: {'; '.join(described[:SHOWN])}{more}")


def by_answer_tokens(task: Classification, prompt: str | None = None, words: str | None = None) -> AnswerTokens:
    r"""A classification task, told by answer tokens instead of a head.

    Args:
        task: with classes.
        prompt: a text with the columns' names in braces, ``\n`` for a line break; default: one of ours for GLUE, else
            the texts line by line and the label column's name.
        words: ``class=word,class=word,...``; default: ours for GLUE; for every class left out, its name.

    Raises:
        ConfigError: a class that there is not, or what :class:`AnswerTokens` finds.
    """
    labels = task.labels or ()
    derived = "".join(f"{{{column}}}\n" for column in task.text_columns) + f"{task.label_column.capitalize()}:"
    ours, own = PROMPTS.get(task.name, (derived, tuple(label.replace("_", " ") for label in labels)))
    chosen = {**dict(zip(labels, own, strict=True)), **_parse_words(words, labels)} if labels else {}
    settings = {field.name: getattr(task, field.name) for field in fields(Classification)}
    return AnswerTokens(
        **settings, prompt=ours if prompt is None else prompt.replace("\\n", "\n"), words=tuple(chosen.values())
    )


def _parse_words(text: str | None, labels: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in [] if text is None else text.split(","):
        label, equals, word = (piece.strip() for piece in part.rpartition("="))
        if not equals or label not in labels or label in found or not word:
            known = ", ".join(labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
            raise ConfigError(
                f"label_words has {part.strip()!r}; write CLASS=WORD, comma-separated, each class once, of: {known}"
            )
        found[label] = word
    return found


def _rows(prompts: list[list[int]], judged: Sequence[Sequence[int]], answers: list[list[int]]) -> Dataset:
    """Each prompt with one or more of the answers; only the answer's tokens are labelled."""
    pairs = [(prompt, answers[label]) for prompt, labels in zip(prompts, judged, strict=True) for label in labels]
    return token_dataset(
        [[*prompt, *answer] for prompt, answer in pairs],
        [[IGNORED] * len(prompt) + answer for prompt, answer in pairs],
    )


class _NextWord:
    """From a batch's logits to the log-probability of every answer of one token, (rows, classes)."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, logits: Logits, labels: torch.Tensor) -> torch.Tensor:
        scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
        return scores[labels[:, 1:] != IGNORED].float().log_softmax(-1)[:, self.tokens]


def _per_token(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability per token of the answer in each row, (rows, 1)."""
    losses, _, count = token_scores(logits, labels).unbind(1)
    return -(losses / count)[:, None]


class _Judge:
    """The task's metric over the answers' scores, and the mean loss of a token of the right answers."""

    def __init__(self, labels: list[int], lengths: list[int], metric: Metric) -> None:
        self.labels, self.lengths, self.metric = np.array(labels), np.array(lengths), metric

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        scores = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1, len(self.lengths))
        labels = self.labels[: len(scores)]
        tokens = self.lengths[labels]
        loss = -(scores[np.arange(len(labels)), labels] * tokens).sum() / tokens.sum()
        return {**self.metric(EvalPrediction(predictions=scores, label_ids=labels)), "loss": float(loss)}

"""What a task may be told: every option once, with its type, bounds, help and owners."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError, DataError
from weightlora.settings import check, setting

OWN_TABLE = "files"
"""The task of the user's own labelled files."""
JSONL = (".jsonl", ".json", ".ndjson")
"""Endings of a path that is a task by itself: a file of prompts and completions, or of chats."""
SQUAD = ("squad", "squad_v2")
GENERATED = ("xsum", "cnn_dailymail", "gsm8k")
"""Tasks that are judged by text that the model writes."""
TEXT = (*SQUAD, *GENERATED, "JSONL")
"""Tasks without classes; "JSONL" stands for a path."""
_LENGTHS = {"squad": 384, "squad_v2": 384, "xsum": 256, "cnn_dailymail": 256, "gsm8k": 512}
_CLASSIFICATION_LENGTH, _FILE_LENGTH = 128, 512
_ROWS = "a positive count, or leave it out for all rows"


def is_file_task(name: str) -> bool:
    """Say whether a task's name is the path of a JSONL file.

    >>> is_file_task("my/chats.jsonl"), is_file_task("gsm8k")
    (True, False)
    """
    return Path(name).suffix.lower() in JSONL


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Describe a task and its rows: which data, which columns, how many rows, and what predicts the class.

    Args:
        name: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli`` (matched), ``qnli``, ``rte``; the embedded
            ``docstrings``; your own labelled ``files``; ``squad``, ``squad_v2``; ``xsum``, ``cnn_dailymail``;
            ``gsm8k``; or the path of a ``.jsonl`` (``.json``, ``.ndjson``) file with prompts and completions, or chats.
        data_dir: folder with ``<task>/train.jsonl`` and ``<task>/validation.jsonl`` (MNLI:
            ``validation_matched.jsonl``; GSM8K: ``test.jsonl``); None for the hub.
        train_file: the training rows of ``files``, JSONL or CSV.
        validation_file: the validation rows of ``files`` or of a ``.jsonl`` task; without one, a tenth of the training
            rows is held out, stratified by class.
        text_column: text column of ``files``, by default ``text``.
        pair_column: its second text column, if any.
        label_column: its label column.
        regression: whether that label is a number to predict.
        max_train_samples: number of random training rows to keep, in random order.
        max_eval_samples: number of random validation rows to keep, in random order.
        holdout: hold out this part of the training rows to evaluate on, and do not read the validation rows. Stratified
            by class, questions on one text together. Use it to tune a learning rate.
        split_seed: seed of every random choice of rows. Runs with different seeds use the same rows: a seed changes
            the model and the order of rows, not the task.
        max_length: tokens per input; 0: the task's default (128 for classification, 384 for SQuAD, ...).
        classify_by: "head" or "answer" (tokens); None: answer tokens for a pretrained decoder, else a new head.
        prompt, label_words: as :func:`weightlora.tasks.by_answer_tokens`.
        doc_stride, max_answer_length, null_score_diff_threshold: as :class:`weightlora.tasks.QuestionAnswering`.
        max_target_length: the most tokens of a summary, or, for ``gsm8k``, of a generated answer.

    Raises:
        ConfigError: a value that is not allowed.
        DataError: a name that is the path of a table.

    >>> TaskSpec(name="squad").max_length
    384
    """

    name: str = setting(
        "docstrings",
        "a GLUE task, squad, squad_v2, xsum, cnn_dailymail, gsm8k, docstrings (embedded, the default), files (your own"
        " labels), or the path of a JSONL file with prompt and completion, or with chats",
        flag="task",
    )
    data_dir: str | None = setting(None, "folder with TASK/train.jsonl and TASK/validation.jsonl; default: the hub")
    train_file: str | None = setting(None, "CSV or JSONL with your training rows (task files)", only=(OWN_TABLE,))
    validation_file: str | None = setting(
        None, "CSV or JSONL with your validation rows; default: a tenth of the training rows", only=(OWN_TABLE, "JSONL")
    )
    text_column: str | None = setting(None, "column with the text (default: text)", only=(OWN_TABLE,))
    pair_column: str | None = setting(None, "column with a second text", only=(OWN_TABLE,))
    label_column: str = setting("label", "column with the label (default: label)")
    regression: bool = setting(False, "the label is a number to predict", only=(OWN_TABLE,))
    max_train_samples: int | None = setting(None, "train on N random rows", metavar="N", least=1, use=_ROWS)
    max_eval_samples: int | None = setting(None, "evaluate on N random rows", metavar="N", least=1, use=_ROWS)
    holdout: float | None = setting(
        None, "evaluate on this share of the training rows, held out, and do not read the validation rows",
        metavar="SHARE", above=0, below=1,
        use="a part of the training rows such as 0.1",
    )  # fmt: skip
    split_seed: int = setting(
        0, "seed that draws the rows of --holdout and --max-...-samples (default: 0)", metavar="N", least=0,
        below=2**32,
        use="0 or more, below 2^32",
    )  # fmt: skip
    max_length: int = setting(
        0, "tokens per input (default: 128; squad 384, summaries 256, text 512)", metavar="N", least=0
    )
    classify_by: str | None = setting(
        None,
        "what predicts the class: a new head, or a language model that answers with a word (default: answer for a"
        " pretrained causal model such as smollm2, else head)",
        choices=("head", "answer"),
    )
    prompt: str | None = setting(
        None,
        "with answer: the prompt, with columns in braces, such as '{sentence}\\nSentiment:'",
        metavar="TEXT",
    )
    label_words: str | None = setting(
        None, "with answer: the word for each class (default: the names of the classes)", metavar="CLASS=WORD,..."
    )
    doc_stride: int | None = setting(
        None, "squad: tokens by which windows overlap (default: a third)", metavar="N", only=SQUAD
    )
    max_answer_length: int | None = setting(None, "squad: tokens per answer (default: 30)", metavar="N", only=SQUAD)
    null_score_diff_threshold: float | None = setting(
        None,
        "squad_v2: how much better 'no answer' must score to be given (default: 0)",
        metavar="X",
        only=("squad_v2",),
    )
    max_target_length: int | None = setting(
        None, "tokens per summary (default: 160) or generated answer (gsm8k: 256)", metavar="N",
        only=GENERATED,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if Path(self.name).suffix and not is_file_task(self.name):
            raise DataError(
                f"task {self.name!r} is a file; a table of texts and labels (.csv, .tsv, .jsonl) goes with"
                f" --task {OWN_TABLE} --train-file {self.name} --label-column COLUMN"
            )
        kind = "JSONL" if is_file_task(self.name) else self.name
        for each in fields(self):
            owners = each.metadata["only"]
            if owners and kind not in owners and getattr(self, each.name) != each.default:
                several = ", ".join("a .jsonl file" if owner == "JSONL" else repr(owner) for owner in owners)
                raise ConfigError(
                    f"{each.name} belongs to task {several}, not to {self.name!r}; drop it, or use that task"
                )
        if kind in TEXT and (given := self.options("classify_by", "prompt", "label_words")):
            raise ConfigError(f"{next(iter(given))} belongs to classification, not to task {self.name!r}; drop it")
        if not self.max_length:
            usual = _FILE_LENGTH if kind == "JSONL" else _LENGTHS.get(self.name, _CLASSIFICATION_LENGTH)
            object.__setattr__(self, "max_length", usual)

    @property
    def lacks_validation(self) -> bool:
        """Whether the task is the user's own file without one of validation rows, so that training rows are held out.

        >>> TaskSpec(name="my/chats.JSON").lacks_validation, TaskSpec(name="gsm8k").lacks_validation
        (True, False)
        """
        return self.validation_file is None and (self.name == OWN_TABLE or is_file_task(self.name))

    @property
    def splits_training_rows(self) -> bool:
        """Whether the rows that judge are drawn from the training rows."""
        return self.holdout is not None or self.lacks_validation

    @property
    def data_name(self) -> str:
        """The task, or the user's own training file, as a message names it."""
        return f"task {self.name!r}" if self.train_file is None else self.train_file

    @property
    def folder(self) -> Path | None:
        """The folder of the data; None for the hub."""
        return None if self.data_dir is None else Path(self.data_dir)

    def options(self, *names: str) -> dict[str, Any]:
        """The options of these names that were given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

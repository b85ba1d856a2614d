"""A task: rows to train on, rows to judge by, and the judge; where it comes from, and how it becomes tokens."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import metrics
from weightlora.tasks.docstrings import load_docstrings
from weightlora.tasks.examples import Examples, hold_out, subset
from weightlora.tasks.files import load_files
from weightlora.tasks.glue import GLUE, load_glue

TASKS = (*GLUE, "docstrings", "files")
DEFAULT_HOLDOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, ready to be tokenized.

    Args:
        name: its name in `TASKS`.
        train: rows to train on.
        validation: rows to judge by.
        text_columns: one text column, or two for pairs, in the order in which the tokenizer gets them.
        label_column: class index (int) or target (float).
        labels: class names by index; None for regression.
        metric: the headline key of what ``compute_metrics`` returns.
        compute_metrics: as ``transformers.Trainer`` wants it.

    Raises:
        DataError: an empty split, a missing column, not one or two text columns, fewer than two classes.
    """

    name: str
    train: Dataset
    validation: Dataset
    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] | None
    metric: str
    compute_metrics: metrics.Metric

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise DataError(
                f"task {self.name!r} names {len(self.text_columns)} text columns; give one, or two for pairs"
            )
        if self.labels is not None and len(self.labels) < 2:
            raise DataError(
                f"task {self.name!r} has {len(self.labels)} class; give two or more, or None for regression"
            )
        for split, rows in (("training", self.train), ("validation", self.validation)):
            if not len(rows):
                raise DataError(f"task {self.name!r} has no {split} rows; give at least one")
            for column in (*self.text_columns, self.label_column):
                if column not in rows.column_names:
                    there = ", ".join(rows.column_names)
                    raise DataError(f"task {self.name!r}: no column {column!r} in its {split} rows; there are: {there}")

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def is_regression(self) -> bool:
        """Whether the target is a number instead of a class."""
        return self.labels is None


def load_task(  # noqa: PLR0913 - one argument per user setting
    name: str,
    *,
    data_dir: Path | None = None,
    train_file: Path | None = None,
    validation_file: Path | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str = "label",
    regression: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    holdout: float | None = None,
    seed: int = 0,
) -> Task:
    """Load a task by name: a GLUE task, the embedded ``docstrings``, or your own ``files``.

    Args:
        name: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli`` (matched), ``qnli``, ``rte``, ``docstrings`` or
            ``files``.
        data_dir: folder with ``<task>/train.jsonl`` and ``<task>/validation.jsonl`` for GLUE; None for the hub.
        train_file: the training rows of ``files``, JSONL or CSV.
        validation_file: its validation rows; without one, a stratified tenth of the training rows is held out.
        text_column: its text column, by default ``text``.
        pair_column: its second text column, if any.
        label_column: its label column.
        regression: whether that label is a number to predict.
        max_train_samples: keep so many random training rows, in random order.
        max_eval_samples: keep so many random validation rows, in random order.
        holdout: leave the validation rows unread and hold out this part of the training rows instead, stratified by
            class: the honest place to tune a learning rate.
        seed: of every random choice here; the global random states are neither read nor changed.

    Returns:
        The task, in memory.

    Raises:
        DataError: an unknown task, or unusable data.
        ConfigError: a setting out of range, or one that the task does not have.

    >>> task = load_task("docstrings", max_train_samples=100, max_eval_samples=20)
    >>> len(task.train), len(task.validation), task.num_labels, task.metric
    (100, 20, 7, 'accuracy')
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"unknown task {name!r}; {hint}the tasks are {', '.join(TASKS)}")
    _check_numbers(max_train_samples=max_train_samples, max_eval_samples=max_eval_samples, holdout=holdout, seed=seed)
    if name == "files":
        source = _files(train_file, validation_file, text_column, pair_column, label_column, regression)
    else:
        own = {"train_file": train_file, "validation_file": validation_file, "text_column": text_column}
        given = [option for option, value in own.items() if value is not None]
        given += ["pair_column"] * (pair_column is not None) + ["regression"] * regression
        if given:
            raise ConfigError(f"{given[0]} belongs to task 'files', not to {name!r}; drop it, or use task 'files'")
        source = _docstrings() if name == "docstrings" else _glue(name, data_dir, validation=holdout is None)
    train, validation = source.train, source.validation
    if holdout is not None or validation is None:
        train, validation = _hold_out(name, train, holdout, seed=seed, stratify=source.labels is not None)
    return Task(
        name=name,
        train=source.dataset(subset(train, max_train_samples, seed=seed, stream="train")),
        validation=source.dataset(subset(validation, max_eval_samples, seed=seed, stream="eval")),
        text_columns=source.text_columns,
        label_column=source.label_column,
        labels=source.labels,
        metric=source.metric,
        compute_metrics=source.compute,
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What every kind of task is read into, before rows are chosen."""

    train: Examples
    validation: Examples | None
    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] | None
    metric: str
    compute: metrics.Metric

    def dataset(self, examples: Examples) -> Dataset:
        label = Value("float64" if self.labels is None else "int64")
        features = Features({name: Value("string") for name in examples.texts} | {self.label_column: label})
        return Dataset.from_dict({**examples.texts, self.label_column: examples.labels}, features=features)


def _files(
    train_file: Path | None,
    validation_file: Path | None,
    text_column: str | None,
    pair_column: str | None,
    label_column: str,
    regression: bool,
) -> _Source:
    if train_file is None:
        raise ConfigError("task 'files' needs train_file, the path of a JSONL or CSV file; pass it")
    columns = ("text" if text_column is None else text_column,) + (() if pair_column is None else (pair_column,))
    every = (*columns, label_column)
    if len(set(every)) < len(every):
        raise ConfigError(f"the columns {', '.join(map(repr, every))} are not all different; name each column once")
    train, validation, labels = load_files(
        train_file, validation_file, text_columns=columns, label_column=label_column, regression=regression
    )
    return _Source(
        train=train,
        validation=validation,
        text_columns=columns,
        label_column=label_column,
        labels=labels,
        metric="pearson" if regression else "accuracy",
        compute=metrics.regression if regression else metrics.accuracy_and_macro_f1,
    )


def _docstrings() -> _Source:
    train, validation, labels = load_docstrings()
    return _Source(
        train=train,
        validation=validation,
        text_columns=("text",),
        labels=labels,
        metric="accuracy",
        compute=metrics.accuracy_and_macro_f1,
    )


def _glue(name: str, data_dir: Path | None, *, validation: bool) -> _Source:
    spec = GLUE[name]
    train, judge = load_glue(name, data_dir, validation=validation)
    return _Source(
        train=train,
        validation=judge,
        text_columns=spec.columns,
        labels=spec.labels,
        metric=spec.metric,
        compute=spec.compute,
    )


def _hold_out(
    name: str, train: Examples, holdout: float | None, *, seed: int, stratify: bool
) -> tuple[Examples, Examples]:
    fraction = DEFAULT_HOLDOUT if holdout is None else holdout
    rest, held = hold_out(train, fraction, seed=seed, stratify=stratify)
    if not len(held) or not len(rest):
        problem = f"holding out {fraction:g} of {len(train)} training rows leaves one side empty"
        raise DataError(f"task {name!r}: {problem}; change holdout, or add rows")
    return rest, held


def tokenize(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> tuple[Dataset, Dataset]:
    """Turn both splits of a task into token ids, without padding (leave that to ``DataCollatorWithPadding``).

    Args:
        task: what to tokenize.
        tokenizer: a tokenizer; pairs are cut longest first.
        max_length: the most tokens per row, special tokens included; never more than the tokenizer's own limit.

    Returns:
        Training and validation rows in memory: ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer
        makes them, and ``labels`` (int64, or float32 for regression).

    Raises:
        ConfigError: ``max_length`` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if max_length <= special:
        raise ConfigError(f"max_length={max_length} leaves no room beside {special} special tokens; give more")
    length = min(max_length, tokenizer.model_max_length)
    label = Value("float32" if task.is_regression else "int64")
    tokenized = []
    for split in (task.train, task.validation):
        texts = [list(split[column]) for column in task.text_columns]
        encoded = tokenizer(*texts, truncation="longest_first", max_length=length, padding=False)
        columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        features = Features(
            {name: Sequence(Value("int32" if name == "input_ids" else "int8")) for name in columns} | {"labels": label}
        )
        tokenized.append(Dataset.from_dict({**columns, "labels": list(split[task.label_column])}, features=features))
    return tokenized[0], tokenized[1]


def _check_numbers(
    *, max_train_samples: int | None, max_eval_samples: int | None, holdout: float | None, seed: int
) -> None:
    for option, limit in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{option}={limit} is below 1; give a positive count, or leave it out for all rows")
    if holdout is not None and not 0.0 < holdout < 1.0:
        raise ConfigError(f"holdout={holdout:g} is not between 0 and 1; give a part of the training rows such as 0.1")
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; give 0 or more")

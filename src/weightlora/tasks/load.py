"""Tasks by name: what there is, what each may be told, and how it is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError, DataError
from weightlora.tasks.answers import QuestionAnswering, read_squad
from weightlora.tasks.classification import CLASSIFICATIONS, load_classification
from weightlora.tasks.completions import Completion, read_completions, read_gsm8k
from weightlora.tasks.delimited import DELIMITERS
from weightlora.tasks.files import Table
from weightlora.tasks.sources import OWN_TABLE, SOURCES, choose, is_file_task, read_splits
from weightlora.tasks.summaries import SUMMARIES, Summarization, read_summaries
from weightlora.tasks.task import Task

SQUAD = ("squad", "squad_v2")
TASKS = (*CLASSIFICATIONS, *SOURCES)
"""Names that `load_task` knows; every path of a JSONL file (``.jsonl``, ``.json``, ``.ndjson``) is a task too."""

# Of whom a setting is, where it is not everybody's. "JSONL" stands for a task that is a file.
_OWNERS: dict[str, tuple[str, ...]] = {
    "train_file": ("files",),
    "validation_file": ("files", "JSONL"),
    "text_column": ("files",),
    "pair_column": ("files",),
    "regression": ("files",),
    "doc_stride": SQUAD,
    "max_answer_length": SQUAD,
    "null_score_diff_threshold": ("squad_v2",),
    "max_target_length": (*SUMMARIES, "gsm8k"),
}
_LENGTHS = {"squad": 384, "squad_v2": 384, "xsum": 256, "cnn_dailymail": 256, "gsm8k": 512}
_CLASSIFICATION_LENGTH, _FILE_LENGTH = 128, 512


def default_max_length(name: str) -> int:
    """Tokens per input where nobody says otherwise.

    >>> default_max_length("sst2"), default_max_length("squad")
    (128, 384)
    """
    return _FILE_LENGTH if is_file_task(name) else _LENGTHS.get(name, _CLASSIFICATION_LENGTH)


def check_name(name: str) -> None:
    """Check that there is a task of this name; nothing is read.

    Raises:
        DataError: there is none; the message names a similar one, and all of them.
    """
    if name in TASKS or is_file_task(name):
        return
    close = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if Path(name).suffix.lower() in DELIMITERS:
        hint = f"a table of texts and labels is the train_file of task {OWN_TABLE!r}; "
    raise DataError(f"unknown task {name!r}; {hint}the tasks are {', '.join(TASKS)}, or the path of a .jsonl file")


def load_task(  # noqa: PLR0913 - one argument per user setting
    name: str,
    *,
    data_dir: str | Path | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str = "label",
    regression: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    holdout: float | None = None,
    doc_stride: int | None = None,
    max_answer_length: int | None = None,
    null_score_diff_threshold: float | None = None,
    max_target_length: int | None = None,
    seed: int = 0,
) -> Task:
    """Load a task by name.

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
        max_train_samples: keep so many random training rows, in random order.
        max_eval_samples: keep so many random validation rows, in random order.
        holdout: leave the validation rows unread and hold out this part of the training rows instead, stratified by
            class, questions on one text together: the honest place to tune a learning rate.
        doc_stride, max_answer_length, null_score_diff_threshold: as :class:`QuestionAnswering` has them.
        max_target_length: the most tokens of a summary, or, for ``gsm8k``, of a generated answer.
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
    check_name(name)
    rows: dict[str, Any] = {
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
        "holdout": holdout,
        "seed": seed,
    }
    _check_numbers(**rows)
    own: dict[str, Any] = {
        "train_file": _path("train_file", train_file),
        "validation_file": _path("validation_file", validation_file),
        "text_column": text_column,
        "pair_column": pair_column,
        "regression": regression or None,
        "doc_stride": doc_stride,
        "max_answer_length": max_answer_length,
        "null_score_diff_threshold": null_score_diff_threshold,
        "max_target_length": max_target_length,
    }
    given = {option: value for option, value in own.items() if value is not None}
    _check_owners(name, given)
    folder = _path("data_dir", data_dir)
    if name in CLASSIFICATIONS:
        return load_classification(name, data_dir=folder, label_column=label_column, **given, **rows)
    tables = read_splits(name, folder, given.pop("validation_file", None), validation=holdout is None)
    if name in SQUAD:
        return _squad(name, tables, rows, given)
    if name in SUMMARIES:
        return _summaries(name, tables, rows, given)
    return _completions(name, tables, rows, given)


def _path(option: str, value: str | Path | None) -> Path | None:
    if not isinstance(value, str | Path | None):
        raise ConfigError(f"{option}={value!r} is not allowed; use a path, or None")
    return None if value is None else Path(value)


def _squad(name: str, tables: list[Table], rows: dict[str, Any], given: dict[str, Any]) -> Task:
    second = name == "squad_v2"

    def read(table: Table) -> Any:
        return read_squad(table, name, may_be_unanswerable=second)

    train, validation = _splits(tables, read, rows, group=lambda row: row["context"])
    return QuestionAnswering(
        name=name, train=train, validation=validation, metric="f1", may_be_unanswerable=second, **given
    )


def _summaries(name: str, tables: list[Table], rows: dict[str, Any], given: dict[str, Any]) -> Task:
    train, validation = _splits(tables, lambda table: read_summaries(table, name), rows)
    text, summary = SUMMARIES[name]
    return Summarization(
        name=name,
        train=train,
        validation=validation,
        metric="rouge1",
        text_column=text,
        summary_column=summary,
        **given,
    )


def _completions(name: str, tables: list[Table], rows: dict[str, Any], given: dict[str, Any]) -> Task:
    if name == "gsm8k":
        train, validation = _splits(tables, read_gsm8k, rows)
        tokens = {"max_new_tokens": given["max_target_length"]} if given else {}
        return Completion(
            name=name, train=train, validation=validation, metric="exact_match", exact_match=True, **tokens
        )
    kinds = []

    def read(table: Table) -> Any:
        dataset, chat = read_completions(table)
        kinds.append((table, chat))
        return dataset

    train, validation = _splits(tables, read, rows)
    if len({chat for _, chat in kinds}) > 1:
        table, chat = kinds[1]
        raise table.error(0, f"{'a chat' if chat else 'plain text'}, unlike the training rows; make both of one kind")
    return Completion(name=name, train=train, validation=validation, metric="mean_token_accuracy", chat=kinds[0][1])


def _splits(
    tables: list[Table],
    read: Callable[[Table], Any],
    rows: dict[str, Any],
    group: Callable[[dict[str, object]], object] | None = None,
) -> tuple[Any, Any]:
    """Both splits, cut to the rows asked for, then checked."""
    train, validation = choose(tables, group=group, **rows)
    return read(train), read(validation)


def _check_owners(name: str, given: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that the task does not have."""
    kind = "JSONL" if is_file_task(name) else name
    for option in given:
        owners = _OWNERS[option]
        if kind not in owners:
            several = ", ".join("a .jsonl file" if owner == "JSONL" else repr(owner) for owner in owners)
            raise ConfigError(f"{option} belongs to task {several}, not to {name!r}; drop it, or use that task")


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

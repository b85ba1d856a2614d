"""Tasks by name: what there is, and how it is read."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError, DataError
from weightlora.tasks.answer_tokens import by_answer_tokens
from weightlora.tasks.answers import QuestionAnswering, read_squad
from weightlora.tasks.classification import CLASSIFICATIONS, Classification, read_classification
from weightlora.tasks.completions import Completion, read_completions, read_gsm8k
from weightlora.tasks.files import Table
from weightlora.tasks.models import completes_text
from weightlora.tasks.sources import SOURCES, choose, read_splits
from weightlora.tasks.spec import OWN_TABLE, SQUAD, TaskSpec, is_file_task
from weightlora.tasks.summaries import SUMMARIES, Summarization, read_summaries
from weightlora.tasks.task import Task
from weightlora.tasks.told import tell_once

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = (*CLASSIFICATIONS, *SOURCES)
"""Names that `load_task` knows; every path of a JSONL file (``.jsonl``, ``.json``, ``.ndjson``) is a task too."""


def check_name(name: str) -> None:
    """Check that there is a task of this name; nothing is read.

    Raises:
        DataError: there is none; the message names a similar one, and all of them.
    """
    if name in TASKS or is_file_task(name):
        return
    close = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if Path(name).is_dir():
        hint = f"a folder of tasks goes with --data-dir, a file of yours with --task {OWN_TABLE} --train-file FILE; "
    raise DataError(f"unknown task {name!r}; {hint}the tasks are {', '.join(TASKS)}, or the path of a .jsonl file")


def load_task(name: str, **options: Any) -> Task:
    """Load a task by name.

    Args:
        name: as :class:`weightlora.tasks.TaskSpec`.
        options: of its other fields those that differ from their defaults. The global random states are neither read
            nor changed.

    Returns:
        The task, in memory.

    Raises:
        DataError: an unknown task, or unusable data.
        ConfigError: a setting out of range, or one that the task does not have.

    >>> task = load_task("docstrings", max_train_samples=100, max_eval_samples=20)
    >>> len(task.train), len(task.validation), task.num_labels, task.metric
    (100, 20, 7, 'accuracy')
    """
    try:
        spec = TaskSpec(name=name, **options)
    except TypeError as error:
        option = str(error).rpartition("argument ")[2]
        raise ConfigError(
            f"a task has no option {option}; the options are the fields of weightlora.tasks.TaskSpec"
        ) from None
    return read_task(spec)


def read_task(spec: TaskSpec, model: str | None = None) -> Task:
    """Read the task of a description.

    Args:
        spec: which task and rows.
        model: the model's name, where classes may be told by its answer tokens; None: by a new head, unless the
            description says otherwise.

    Raises:
        DataError, ConfigError: as :func:`load_task`.
    """
    check_name(spec.name)
    if spec.folder is not None and (spec.name in ("docstrings", OWN_TABLE) or is_file_task(spec.name)):
        tell_once(logging.WARNING, f"data_dir={spec.data_dir} has no effect: {spec.data_name} has its rows elsewhere")
    if spec.name in CLASSIFICATIONS:
        return _told(spec, read_classification(spec), model)
    tables = read_splits(spec)
    if spec.name in SQUAD:
        return _squad(spec, tables)
    return _summaries(spec, tables) if spec.name in SUMMARIES else _completions(spec, tables)


def _told(spec: TaskSpec, task: Classification, model: str | None) -> Task:
    """The task as its classes are told: by a new head, or by the answer tokens of a model that has words."""
    chosen = spec.classify_by
    if chosen is None:
        chosen = "answer" if model is not None and not task.is_regression and completes_text(model) else "head"
    if chosen == "answer":
        return by_answer_tokens(task, spec.prompt, spec.label_words)
    if asked := spec.options("prompt", "label_words"):
        raise ConfigError(
            f"{next(iter(asked))} is for a model that answers in words, and here a new head predicts the class;"
            " drop it, or pass classify_by='answer'"
        )
    return task


def _squad(spec: TaskSpec, tables: list[Table]) -> Task:
    second = spec.name == "squad_v2"

    def read(table: Table) -> Dataset:
        return read_squad(table, spec.name, may_be_unanswerable=second)

    train, validation = map(read, choose(spec, tables, group=lambda row: row["context"]))
    options = spec.options("doc_stride", "max_answer_length", "null_score_diff_threshold")
    return QuestionAnswering(
        name=spec.name, train=train, validation=validation, metric="f1", may_be_unanswerable=second, **options
    )


def _summaries(spec: TaskSpec, tables: list[Table]) -> Task:
    train, validation = (read_summaries(table, spec.name) for table in choose(spec, tables))
    text, summary = SUMMARIES[spec.name]
    return Summarization(
        name=spec.name,
        train=train,
        validation=validation,
        metric="rouge1",
        text_column=text,
        summary_column=summary,
        **spec.options("max_target_length"),
    )


def _completions(spec: TaskSpec, tables: list[Table]) -> Task:
    if spec.name == "gsm8k":
        train, validation = map(read_gsm8k, choose(spec, tables))
        tokens: dict[str, Any] = {} if spec.max_target_length is None else {"max_new_tokens": spec.max_target_length}
        return Completion(
            name=spec.name, train=train, validation=validation, metric="exact_match", exact_match=True, **tokens
        )
    (train, chat), (validation, other) = map(read_completions, rows := choose(spec, tables))
    if chat != other:
        what = "a chat" if other else "plain text"
        raise rows[1].error(0, f"{what}, unlike the training rows; make both of one kind")
    return Completion(name=spec.name, train=train, validation=validation, metric="mean_token_accuracy", chat=chat)

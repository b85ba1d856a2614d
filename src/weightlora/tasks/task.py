"""What every task is: rows to train on, rows to judge by, and how both become batches and a metric."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import Trainer

from weightlora.errors import DataError
from weightlora.tasks.targets import Targets

if TYPE_CHECKING:
    from datasets import Dataset  # which a plan does without

    from weightlora.tasks.evaluation import Logits
    from weightlora.tasks.metrics import Metric
    from weightlora.tasks.models import LoadedModel

Head = Literal["sequence-classification", "question-answering", "seq2seq-lm", "causal-lm"]
"""What a model puts on its backbone, as the ``AutoModelFor...`` classes are called."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task for one model, as a ``transformers.Trainer`` takes it.

    Args:
        train: tokenized rows to train on.
        validation: tokenized rows to judge by.
        collator: makes a batch of rows.
        compute_metrics: from the trainer's predictions to the task's numbers.
        preprocess_logits: cuts a batch's outputs down to what ``compute_metrics`` needs; None: nothing to cut.
        ordered: whether ``compute_metrics`` takes predictions by their place: row i of the validation rows.
        trainer: the trainer's class.
        training: training arguments whose defaults differ for this task.
        targets: of a regression, whose labels are standardised: once the model is judged, ``targets.fold`` makes its
            head answer in the user's units. None for every other task.
    """

    train: Dataset
    validation: Dataset
    collator: Callable[[list[Any]], dict[str, Any]]
    compute_metrics: Metric
    preprocess_logits: Callable[[Logits, torch.Tensor], Logits] | None = None
    ordered: bool = False
    trainer: type[Trainer] = Trainer
    training: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task, ready to be tokenized.

    Args:
        name: as :func:`weightlora.tasks.load_task` knows it.
        train: rows to train on.
        validation: rows to judge by.
        metric: the headline key of the task's metrics; more of it is better.

    Raises:
        DataError: an empty split, or a missing column.
    """

    head: ClassVar[Head]

    name: str
    train: Dataset
    validation: Dataset
    metric: str

    def __post_init__(self) -> None:
        for split, rows in (("training", self.train), ("validation", self.validation)):
            if not len(rows):
                raise DataError(f"task {self.name!r} has no {split} rows; give at least one")
            for column in self.columns:
                if column not in rows.column_names:
                    there = ", ".join(rows.column_names)
                    raise DataError(f"task {self.name!r}: no column {column!r} in its {split} rows; there are: {there}")

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that both splits must have."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The columns of texts by which a row is known again; its label does not count."""

    @functools.cached_property
    def seen_rows(self) -> int:
        """How many validation rows have the texts of a training row."""
        judged = list(zip(*(self.validation[column] for column in self.inputs), strict=True))
        wanted = set(judged)
        seen = {row for row in zip(*(self.train[column] for column in self.inputs), strict=True) if row in wanted}
        return sum(row in seen for row in judged)

    @property
    def model_settings(self) -> dict[str, Any]:
        """What :func:`weightlora.tasks.load_model` must know to load a model for this task."""
        return {"head": self.head}

    def targets(self, loaded: LoadedModel) -> Targets | None:
        """How this task standardises its targets for a model; None where it has no regression targets."""
        return None

    @abstractmethod
    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        """Tokenize both splits for a model.

        Args:
            loaded: a model loaded with `model_settings`.
            max_length: the most tokens per input, special tokens included.

        Raises:
            ConfigError: ``max_length`` or another setting does not fit the data.
        """

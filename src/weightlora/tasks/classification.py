"""Classification and regression: GLUE, the embedded docstrings, the user's own files; how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset, Features, Sequence, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import metrics
from weightlora.tasks.docstrings import load_docstrings
from weightlora.tasks.examples import Examples, hold_out, subset
from weightlora.tasks.glue import GLUE, load_glue
from weightlora.tasks.labelled import load_files
from weightlora.tasks.models import LoadedModel
from weightlora.tasks.sources import DEFAULT_HOLDOUT
from weightlora.tasks.spec import OWN_TABLE, TaskSpec
from weightlora.tasks.targets import Targets
from weightlora.tasks.task import Head, Prepared, Task

CLASSIFICATIONS = (*GLUE, "docstrings", OWN_TABLE)


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Sequence classification, or regression: one label per text or pair of texts.

    Args:
        text_columns: one text column, or two for pairs, in the order in which the tokenizer gets them.
        label_column: class index (int) or target (float).
        labels: class names by index; None for regression.
        compute_metrics: as ``transformers.Trainer`` wants it.

    Raises:
        DataError: not one or two text columns, fewer than two classes.
    """

    head: ClassVar[Head] = "sequence-classification"

    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] | None
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
        super().__post_init__()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.text_columns, self.label_column)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.text_columns

    @property
    def model_settings(self) -> dict[str, object]:
        labels = {"num_labels": self.num_labels, "labels": self.labels, "regression": self.is_regression}
        return {"head": self.head, **labels}

    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        targets = self.targets(loaded)
        if targets is not None:
            targets.announce(loaded.model.config)
        train, validation = tokenize(self, loaded.tokenizer, max_length, targets)
        return Prepared(
            train=train,
            validation=validation,
            collator=DataCollatorWithPadding(loaded.tokenizer),
            compute_metrics=self.compute_metrics if targets is None else targets.judge(self.compute_metrics),
            targets=targets,
        )

    def targets(self, loaded: LoadedModel) -> Targets | None:
        if not self.is_regression or loaded.answer_layer is None:
            return None
        layer = loaded.model.get_submodule(loaded.answer_layer)
        return Targets.of(self.train[self.label_column], loaded.answer_layer, bias=layer.bias is not None)

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def is_regression(self) -> bool:
        """Whether the target is a number instead of a class."""
        return self.labels is None


def read_classification(spec: TaskSpec) -> Classification:
    """Read a GLUE task, ``docstrings`` or ``files``; errors as :func:`weightlora.tasks.load_task`."""
    source = _READERS.get(spec.name, _glue)(spec)
    train, validation, seed = source.train, source.validation, spec.split_seed
    if spec.holdout is not None or validation is None:
        train, validation = _hold_out(spec.name, train, spec.holdout, seed=seed, stratify=source.labels is not None)
    return Classification(
        name=spec.name,
        train=source.dataset(subset(train, spec.max_train_samples, seed=seed, stream="train")),
        validation=source.dataset(subset(validation, spec.max_eval_samples, seed=seed, stream="eval")),
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


def _files(spec: TaskSpec) -> _Source:
    if spec.train_file is None:
        raise ConfigError("task 'files' needs train_file, the path of a JSONL or CSV file; pass it")
    text, label = spec.text_column or "text", spec.label_column
    columns = (text,) if spec.pair_column is None else (text, spec.pair_column)
    every = (*columns, label)
    if len(set(every)) < len(every):
        raise ConfigError(f"the columns {', '.join(map(repr, every))} are not all different; name each column once")
    judge = Path(spec.validation_file) if spec.validation_file and spec.holdout is None else None
    train, validation, labels = load_files(
        Path(spec.train_file), judge, text_columns=columns, label_column=label, regression=spec.regression
    )
    return _Source(
        train=train,
        validation=validation,
        text_columns=columns,
        label_column=label,
        labels=labels,
        metric="pearson" if spec.regression else "accuracy",
        compute=metrics.regression if spec.regression else metrics.accuracy_and_macro_f1,
    )


def _docstrings(spec: TaskSpec) -> _Source:
    train, validation, labels = load_docstrings()
    return _Source(
        train=train,
        validation=validation,
        text_columns=("text",),
        labels=labels,
        metric="accuracy",
        compute=metrics.accuracy_and_macro_f1,
    )


def _glue(spec: TaskSpec) -> _Source:
    glue = GLUE[spec.name]
    train, *rest = load_glue(spec)
    return _Source(
        train=train,
        validation=rest[0] if rest else None,
        text_columns=glue.columns,
        labels=glue.labels,
        metric=glue.metric,
        compute=glue.compute,
    )


_READERS = {OWN_TABLE: _files, "docstrings": _docstrings}


def _hold_out(
    name: str, train: Examples, holdout: float | None, *, seed: int, stratify: bool
) -> tuple[Examples, Examples]:
    fraction = DEFAULT_HOLDOUT if holdout is None else holdout
    rest, held = hold_out(train, fraction, seed=seed, stratify=stratify)
    if not len(held) or not len(rest):
        problem = f"holding out {fraction:g} of {len(train)} training rows leaves one side empty"
        raise DataError(f"task {name!r}: {problem}; change holdout, or add rows")
    return rest, held


def tokenize(
    task: Classification, tokenizer: PreTrainedTokenizerBase, max_length: int = 128, targets: Targets | None = None
) -> tuple[Dataset, Dataset]:
    """Turn both splits into token ids, without padding (leave that to ``DataCollatorWithPadding``).

    Args:
        task: what to tokenize.
        tokenizer: a tokenizer; pairs are cut longest first.
        max_length: the most tokens per row, special tokens included; never more than the tokenizer's own limit.
        targets: of a regression, to standardise its labels; None leaves them as they are.

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
        labels = list(split[task.label_column])
        labels = labels if targets is None else targets.standard(labels)
        tokenized.append(Dataset.from_dict({**columns, "labels": labels}, features=features))
    return tokenized[0], tokenized[1]

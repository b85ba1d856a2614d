"""The eight GLUE tasks with their own columns, label numbers and metrics, from the hub or from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightlora.errors import DataError
from weightlora.tasks import metrics
from weightlora.tasks.examples import Examples
from weightlora.tasks.files import Table, read_table, read_targets, read_texts
from weightlora.tasks.sources import Source, from_hub

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class GlueSpec:
    """What one GLUE task looks like; ``labels`` in GLUE's own numbering, None for regression."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: str
    compute: metrics.Metric
    validation: str = "validation"


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueSpec] = {
    "cola": GlueSpec(
        columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metric="matthews_correlation",
        compute=metrics.matthews_correlation,
    ),
    "sst2": GlueSpec(
        columns=("sentence",), labels=("negative", "positive"), metric="accuracy", compute=metrics.accuracy
    ),
    "mrpc": GlueSpec(
        columns=PAIR, labels=("not_equivalent", "equivalent"), metric="acc_f1", compute=metrics.accuracy_and_f1
    ),
    "qqp": GlueSpec(
        columns=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metric="acc_f1",
        compute=metrics.accuracy_and_f1,
    ),
    "stsb": GlueSpec(columns=PAIR, labels=None, metric="corr", compute=metrics.correlation),
    "mnli": GlueSpec(
        columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        metric="accuracy_matched",
        compute=metrics.accuracy_matched,
        validation="validation_matched",
    ),
    "qnli": GlueSpec(columns=("question", "sentence"), labels=ENTAILMENT, metric="accuracy", compute=metrics.accuracy),
    "rte": GlueSpec(columns=PAIR, labels=ENTAILMENT, metric="accuracy", compute=metrics.accuracy),
}


def load_glue(name: str, data_dir: Path | None, *, validation: bool) -> tuple[Examples, Examples | None]:
    """Read a GLUE task's training and validation split.

    Args:
        name: one of `GLUE`.
        data_dir: folder that holds ``<name>/train.jsonl`` and ``<name>/validation.jsonl`` (MNLI:
            ``validation_matched.jsonl``); None for the hub's ``nyu-mll/glue``.
        validation: whether the validation split is wanted at all.

    Returns:
        Both splits, the second one None where it is not wanted.

    Raises:
        DataError: a file is missing or wrong, or the hub cannot be reached.
    """
    spec = GLUE[name]
    splits = ("train", spec.validation) if validation else ("train",)
    read = _from_hub(name, splits) if data_dir is None else _from_folder(name, data_dir, splits)
    return read[0], read[1] if validation else None


def _from_folder(name: str, data_dir: Path, splits: tuple[str, ...]) -> list[Examples]:
    folder = data_dir / name
    if not folder.is_dir():
        here = sorted(task for task in GLUE if (data_dir / task).is_dir()) if data_dir.is_dir() else []
        problem = f"it holds: {', '.join(here)}" if here else "it holds no GLUE task"
        raise DataError(
            f"{folder}: no such folder for task {name!r} in data_dir ({problem}); add {name}/train.jsonl and"
            f" {name}/{GLUE[name].validation}.jsonl, or leave data_dir out to use the hub"
        )
    spec = GLUE[name]
    remedy = f"task {name!r} needs the columns {', '.join((*spec.columns, 'label'))}"
    found = []
    for split in splits:
        table = read_table(folder / f"{split}.jsonl")
        texts = {column: read_texts(table, column, remedy) for column in spec.columns}
        if spec.labels is None:
            found.append(Examples(texts=texts, labels=read_targets(table, "label", remedy)))
        else:
            found.append(Examples(texts=texts, labels=_label_numbers(table, spec.labels, remedy)))
    return found


def _label_numbers(table: Table, names: tuple[str, ...], remedy: str) -> list[int]:
    numbers = []
    for row, value in enumerate(table.column("label", remedy)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
            allowed = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
            raise table.error(row, f"the label {value!r} is not one of {allowed}; use a labelled split, with numbers")
        numbers.append(value)
    return numbers


def _from_hub(name: str, splits: tuple[str, ...]) -> list[Examples]:
    spec = GLUE[name]
    source = Source(hub=HUB_NAME, config=name, validation=spec.validation)
    loaded = [from_hub(name, source, split) for split in splits]
    return [
        Examples(texts={column: list(split[column]) for column in spec.columns}, labels=list(split["label"]))
        for split in loaded
    ]

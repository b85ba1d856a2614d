"""The eight GLUE tasks with their own columns, label numbers and metrics, from the hub or from a folder."""

from __future__ import annotations

from dataclasses import dataclass

from weightlora.tasks import metrics
from weightlora.tasks.examples import Examples
from weightlora.tasks.files import Table, read_targets, read_texts
from weightlora.tasks.sources import Source, read_source
from weightlora.tasks.spec import TaskSpec

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


def load_glue(spec: TaskSpec) -> list[Examples]:
    """Read a GLUE task's training rows and, where they judge, its validation rows.

    Args:
        spec: of one of `GLUE`; its ``data_dir`` holds ``<name>/train.jsonl`` and ``<name>/validation.jsonl`` (MNLI:
            ``validation_matched.jsonl``), without one they come from the hub's ``nyu-mll/glue``.

    Raises:
        DataError: a file is missing or wrong, or the hub cannot be reached.
    """
    glue = GLUE[spec.name]
    remedy = f"task {spec.name!r} needs the columns {', '.join((*glue.columns, 'label'))}"
    found = []
    for table in read_source(spec, Source(hub=HUB_NAME, config=spec.name, validation=glue.validation)):
        texts = {column: read_texts(table, column, remedy) for column in glue.columns}
        if glue.labels is None:
            found.append(Examples(texts=texts, labels=read_targets(table, "label", remedy)))
        else:
            found.append(Examples(texts=texts, labels=_label_numbers(table, glue.labels, remedy)))
    return found


def _label_numbers(table: Table, names: tuple[str, ...], remedy: str) -> list[int]:
    numbers = []
    for row, value in enumerate(table.column("label", remedy)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
            allowed = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
            raise table.error(row, f"the label {value!r} is not one of {allowed}; use a labelled split, with numbers")
        numbers.append(value)
    return numbers

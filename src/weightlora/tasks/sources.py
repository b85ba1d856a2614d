"""The text tasks beside GLUE as tables of rows: from the hub, from a folder, or from the user's own JSONL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from weightlora.errors import DataError
from weightlora.tasks.examples import Examples, hold_out, shuffled
from weightlora.tasks.files import Table, read_table
from weightlora.tasks.hub import unreachable
from weightlora.tasks.spec import TaskSpec, is_file_task

DEFAULT_HOLDOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's rows are: data set and configuration on the hub, and the split to judge by."""

    hub: str
    config: str | None = None
    validation: str = "validation"


SOURCES: dict[str, Source] = {
    "squad": Source(hub="rajpurkar/squad"),
    "squad_v2": Source(hub="rajpurkar/squad_v2"),
    "xsum": Source(hub="EdinburghNLP/xsum"),
    "cnn_dailymail": Source(hub="abisee/cnn_dailymail", config="3.0.0"),
    "gsm8k": Source(hub="openai/gsm8k", config="main", validation="test"),
}


def read_splits(spec: TaskSpec) -> list[Table]:
    """Read the training rows and, where they judge and there are any, the validation rows.

    Raises:
        DataError: a file is missing or broken, or the hub cannot be reached.
    """
    if is_file_task(spec.name):
        files = [spec.name, *([spec.validation_file] if spec.validation_file and spec.holdout is None else [])]
        return [read_table(Path(file)) for file in files]
    return list(read_source(spec, SOURCES[spec.name]))


def read_source(spec: TaskSpec, source: Source) -> Iterator[Table]:
    """Read the training rows of a task with a source and, where they judge, the validation rows.

    Raises:
        DataError: a file is missing or broken, or the hub cannot be reached.
    """
    name, folder = spec.name, spec.folder
    if folder is not None and not (folder / name).is_dir():
        here = ", ".join(sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())[:8]) or "no folder"
        raise DataError(
            f"{folder / name}: no such folder for task {name!r} in data_dir (it holds {here});"
            f" add {name}/train.jsonl and {name}/{source.validation}.jsonl, or leave data_dir out to use the hub"
        )
    for split in ("train", source.validation) if spec.holdout is None else ("train",):
        if folder is not None:
            yield read_table(folder / name / f"{split}.jsonl")
        else:
            rows = _from_hub(name, source, split).to_list()
            yield Table(path=Path(source.hub) / split, rows=rows, lines=list(range(1, len(rows) + 1)))


def _from_hub(name: str, source: Source, split: str) -> datasets.Dataset:
    reason = None if Path(source.hub).is_dir() else unreachable(source.hub, "README.md", "dataset")
    if reason is None:
        try:
            return datasets.load_dataset(source.hub, source.config, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().split("\n")[0]
    raise DataError(
        f"task {name!r} cannot be read from the hub's {source.hub} ({reason}); check the network, or pass data_dir,"
        f" a folder with {name}/train.jsonl and {name}/{source.validation}.jsonl"
    )


def choose(
    spec: TaskSpec, tables: list[Table], group: Callable[[dict[str, object]], object] | None = None
) -> tuple[Table, Table]:
    """Cut training rows and, perhaps, validation rows to those that are asked for.

    A smaller number of rows is a prefix of a larger one. Without validation rows a share of the training rows judges,
    by default a tenth.

    Args:
        spec: which rows.
        tables: as :func:`read_splits`.
        group: rows for which it gives the same value are held out together (questions on one paragraph); None: every
            row stands alone.

    Raises:
        DataError: holding out leaves one side empty.
    """
    train, *rest = tables
    seed = spec.split_seed
    if rest:
        validation = rest[0]
    else:
        train, validation = _hold_out(train, spec.holdout or DEFAULT_HOLDOUT, group, seed)
    train = _subset(train, spec.max_train_samples, seed, "train")
    return train, _subset(validation, spec.max_eval_samples, seed, "eval")


def _hold_out(
    table: Table, share: float, group: Callable[[dict[str, object]], object] | None, seed: int
) -> tuple[Table, Table]:
    members: dict[object, list[int]] = {}
    for number, row in enumerate(table.rows):
        members.setdefault(number if group is None else group(row), []).append(number)
    groups = list(members.values())
    halves = hold_out(Examples(texts={}, labels=list(range(len(groups)))), share, seed=seed, stratify=False)
    rest, held = (table.take([row for index in half.labels for row in groups[int(index)]]) for half in halves)
    if not len(rest) or not len(held):
        raise DataError(
            f"{table.path}: holding out {share:g} of {len(table)} training rows leaves one side empty; change holdout,"
            " or add rows"
        )
    return rest, held


def _subset(table: Table, limit: int | None, seed: int, stream: str) -> Table:
    return table if limit is None else table.take(shuffled(len(table), seed=seed, stream=stream)[:limit])

"""The text tasks beside GLUE as tables of rows: from the hub, from a folder, or from the user's own JSONL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

from weightlora.errors import DataError
from weightlora.tasks.examples import Examples, hold_out, shuffled
from weightlora.tasks.files import JSONL, Table, read_table

DEFAULT_HOLDOUT = 0.1
OWN_TABLE = "files"


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


def is_file_task(name: str) -> bool:
    """Whether a task's name is the path of a JSONL file.

    >>> is_file_task("my/chats.jsonl"), is_file_task("gsm8k")
    (True, False)
    """
    return Path(name).suffix.lower() in JSONL


def lacks_validation(name: str, validation_file: object) -> bool:
    """Whether a task is the user's own file without one of validation rows, so that training rows are held out.

    >>> lacks_validation("my/chats.JSON", None), lacks_validation("files", "v.csv"), lacks_validation("gsm8k", None)
    (True, False, False)
    """
    return validation_file is None and (name == OWN_TABLE or is_file_task(name))


def read_splits(name: str, data_dir: Path | None, validation_file: Path | None, *, validation: bool) -> list[Table]:
    """Read the training rows and, where they are wanted and there are any, the validation rows.

    Args:
        name: one of `SOURCES`, or the path of a JSONL file.
        data_dir: folder that holds ``<name>/train.jsonl`` and ``<name>/validation.jsonl`` (GSM8K: ``test.jsonl``);
            None for the hub.
        validation_file: the validation rows of a file.
        validation: whether they are wanted at all.

    Raises:
        DataError: a file is missing or broken, or the hub cannot be reached.
    """
    if is_file_task(name):
        paths = [Path(name), *([validation_file] if validation and validation_file else [])]
        return [read_table(path) for path in paths]
    source = SOURCES[name]
    splits = ("train", source.validation) if validation else ("train",)
    if data_dir is None:
        hub = Path(source.hub)
        read = [(hub / split, from_hub(name, source, split).to_list()) for split in splits]
        return [Table(path=path, rows=rows, lines=list(range(1, len(rows) + 1))) for path, rows in read]
    if not (data_dir / name).is_dir():
        raise DataError(
            f"{data_dir / name}: no such folder for task {name!r} in data_dir; add {name}/train.jsonl and"
            f" {name}/{source.validation}.jsonl, or leave data_dir out to use the hub"
        )
    return [read_table(data_dir / name / f"{split}.jsonl") for split in splits]


def from_hub(name: str, source: Source, split: str) -> datasets.Dataset:
    """One split of a data set on the hub.

    Raises:
        DataError: it cannot be read; the message names the folder that would do instead.
    """
    try:
        return datasets.load_dataset(source.hub, source.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"task {name!r} cannot be read from the hub's {source.hub} ({reason}); check the network, or pass data_dir,"
            f" a folder with {name}/train.jsonl and {name}/{source.validation}.jsonl"
        ) from None


def choose(
    tables: list[Table],
    *,
    group: Callable[[dict[str, object]], object] | None,
    holdout: float | None,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
) -> tuple[Table, Table]:
    """Cut the tables to the rows that are asked for.

    Args:
        tables: training rows and, perhaps, validation rows.
        group: rows for which it gives the same value are held out together (questions on one paragraph); None: every
            row stands alone.
        holdout: the share of training rows to judge by where there are no validation rows; by default a tenth.
        max_train_samples, max_eval_samples: so many random rows, in random order; None: all, in their order.
        seed: chooses the rows; a smaller number of rows is a prefix of a larger one.

    Raises:
        DataError: holding out leaves one side empty.
    """
    train, *rest = tables
    if rest:
        validation = rest[0]
    else:
        train, validation = _hold_out(train, DEFAULT_HOLDOUT if holdout is None else holdout, group, seed)
    return _subset(train, max_train_samples, seed, "train"), _subset(validation, max_eval_samples, seed, "eval")


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

"""The record of one run: what was asked, what happened, what it cost. Plain data; imports no torch.

``record.json`` is strict JSON with a stable key order, so that other programs can rely on it. Keys are only ever
added within one schema version; a reader ignores those it does not know.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Literal

from weightlora.cost.results import FrontierPoint, PhaseResult
from weightlora.decoding import decode, kind_of, refuse_constant, require, to_plain
from weightlora.errors import CheckpointError, ConfigError
from weightlora.files import write_text

SCHEMA_VERSION = 1
EVAL_LOSS = "eval_loss"
LOWER_IS_BETTER = (EVAL_LOSS, "perplexity", "mse")
STATUSES = ("running", "ok", "failed")
PACKAGES = ("weightlora", "torch", "transformers", "peft", "accelerate", "trl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """One adapter that lives on after the seam: its module name, its gate omega and its rank.

    >>> Kept(name="layer.0.query", omega=0.7, rank=8).rank
    8
    """

    name: str
    omega: float
    rank: int

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"kept adapter {self.name!r} has rank {self.rank}; a rank is 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterScore:
    """One of the n adapters the run began with, and how it fared.

    Args:
        name: module name in the model.
        block: index of its layer, or None outside the stack of layers.
        kind: what it adapts inside its layer, for example ``"attention.self.query"``.
        omega: its gate when the selection was made.
        score: the number the method ranked it by; None where the method ranks nothing.
        kept: whether it lives on.
    """

    name: str
    block: int | None
    kind: str
    omega: float
    score: float | None
    kept: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Everything about one run that is worth keeping, as it lies in ``record.json``.

    Args:
        schema_version: 1.
        status: ``"running"``, ``"ok"`` or ``"failed"``.
        method, preset, task, model, seed: what was run. ``k`` and ``r``: adapters to keep and rank, as resolved
            (``k`` is None where the method chooses how many).
        n_adapters: adapters at the start; 0 for full fine-tuning.
        kept: the adapters at the end. ``adapters``: all n of them in module order, or empty.
        trainable_params: ``{"warmup": int, "final": int}``; both are there once the status is ``"ok"``.
        metrics: the task's numbers. ``metric``: which of them is the headline.
        phases: in order of time. ``seam_step``: the step after which the surgery was done; None without one.
        max_steps: optimizer steps asked for.
        why: the method's reason for its selection, in words.
        versions, argv, config, machine: how to run it again, and on what kind of machine it ran.
        error: one line when the status is ``"failed"``.
        budget: adapter parameters, heads excluded: ``asked`` (``--params``, if given), ``allocated``, ``trainable``
            until the seam, at the ``peak`` of the run, ``effective`` at the end, and ``stored_bytes`` of the adapter's
            files. ``unmet``: why peak or end are more than 5% off what was asked; empty where they are not.
        scored_on: the rows behind ``metrics``: ``split`` ("validation", or "train" for training rows that were held
            out, by ``split_seed`` and the share ``holdout`` if one was asked for) and ``rows``; ``train_rows``: how
            many there were to train on; ``also_trained_on``: how many of ``rows`` have the texts of training rows, if
            any; ``checkpoint``: "best" where they chose it.
        predicted: ``{phase name: {field of PhaseResult: number}}``, from one traced forward before the first step.
        frontier: what the best k hold and cost, for several k; empty without scores.
        placement: where a budget decided what lives: its kind, the budget, what the survivors cost, the lowest level
            they reach, their importance, the micro-batch. Empty where a count decided.

    Raises:
        ConfigError: the fields contradict each other.
    """

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "ok", "failed"]
    method: str
    preset: str
    task: str
    model: str
    seed: int
    k: int | None
    r: int | None
    n_adapters: int
    kept: tuple[Kept, ...]
    adapters: tuple[AdapterScore, ...]
    trainable_params: dict[str, int]
    metrics: dict[str, float]
    metric: str
    phases: tuple[PhaseResult, ...]
    seam_step: int | None
    max_steps: int | None
    why: str
    versions: dict[str, str]
    argv: tuple[str, ...]
    config: dict[str, object]
    error: str | None
    machine: dict[str, str | int]
    budget: dict[str, int] = dataclasses.field(default_factory=dict)
    unmet: str = dataclasses.field(default_factory=str)
    scored_on: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    predicted: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    frontier: tuple[FrontierPoint, ...] = ()
    placement: dict[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.schema_version == SCHEMA_VERSION
        require(known, f"schema_version is {self.schema_version}; this release writes {SCHEMA_VERSION}")
        require(self.status in STATUSES, f"status is {self.status!r}; allowed are {', '.join(STATUSES)}")
        require(self.n_adapters >= 0, f"n_adapters is {self.n_adapters}; it cannot be negative")
        strange = sorted(set(self.trainable_params) - {"warmup", "final"})
        require(not strange, f"trainable_params has the keys {strange}; allowed are 'warmup' and 'final'")
        require(
            self.status != "ok" or len(self.trainable_params) == 2,
            "trainable_params of a finished run needs both 'warmup' and 'final'",
        )
        self._check_adapters()

    def _check_adapters(self) -> None:
        """Raise ConfigError unless ``kept``, ``adapters`` and ``n_adapters`` tell one story."""
        kept = [entry.name for entry in self.kept]
        names = [entry.name for entry in self.adapters]
        for field, listed in (("kept", kept), ("adapters", names)):
            twice = sorted({name for name in listed if listed.count(name) > 1})
            require(not twice, f"{field} names {twice} more than once")
        require(len(kept) <= self.n_adapters, f"{len(kept)} adapters are kept, but n_adapters is {self.n_adapters}")
        if not names:
            return
        require(len(names) == self.n_adapters, f"adapters lists {len(names)}, but n_adapters is {self.n_adapters}")
        missing = sorted(set(kept) - set(names))
        require(not missing, f"kept names {missing}, which adapters does not list")
        flagged = {entry.name for entry in self.adapters if entry.kept}
        require(
            self.status != "ok" or flagged == set(kept),
            f"kept and the kept flags of adapters differ in {sorted(flagged ^ set(kept))}",
        )

    @property
    def score(self) -> float | None:
        """The headline metric, or None when the run did not get that far."""
        return self.metrics.get(self.metric)

    @property
    def merit(self) -> float | None:
        """The headline metric, turned so that more is better: what runs are ranked by."""
        return self.score if self.score is None or self.metric not in LOWER_IS_BETTER else -self.score

    def judged_by(self, metric: str | None) -> Record:
        """The same run with another headline metric; None leaves its own.

        Raises:
            ConfigError: a metric that not every task has.
        """
        check_metric(metric)
        return self if metric is None else dataclasses.replace(self, metric=metric)

    @property
    def final_phase(self) -> PhaseResult | None:
        """The phase after the last seam, or the only one."""
        return self.phases[-1] if self.phases else None

    def to_json(self) -> str:
        """The record as strict JSON: fields in schema order, free dictionaries sorted, equal records in equal bytes.

        A float that is not finite becomes ``null``, since JSON has no word for it.

        Raises:
            ConfigError: a value is not plain data, or has not the type that the schema promises.
        """
        text = json.dumps(to_plain(self, "record"), indent=2, allow_nan=False) + "\n"
        try:
            Record.from_json(text)  # what cannot be read must never be written
        except CheckpointError as error:
            raise ConfigError(f"this record cannot be stored: {error}") from error
        return text

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record in ``text``; keys that this release does not know are ignored.

        ``null`` where the schema says float reads as NaN; where it allows None (``score``), as None.

        Raises:
            CheckpointError: no JSON, another schema version, a key that is missing or of the wrong type.

        >>> Record.from_json('{"schema_version": 7}')
        Traceback (most recent call last):
        weightlora.errors.CheckpointError: the record has schema version 7; this release reads 1: update weightlora
        """
        try:
            data = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the record is not strict JSON: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"the record must be a JSON object, not {kind_of(data)}")
        if "schema_version" not in data:
            raise CheckpointError("the record has no key 'schema_version': this is not a run's record.json")
        version = data["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise CheckpointError(
                f"the record has schema version {version!r}; this release reads {SCHEMA_VERSION}: update weightlora"
            )
        try:
            record: Record = decode(cls, data, "")
        except ConfigError as error:
            raise CheckpointError(f"the record contradicts itself: {error}") from error
        return record

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Store the record at ``path``; a reader sees the old file or the new one, never a part. Returns the path."""
        return write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Record:
        """The record stored at ``path``.

        Raises:
            CheckpointError: no such file, or `from_json`'s reasons, with the path in front.
        """
        path = Path(path)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: no record can be read here ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def check_metric(metric: str | None) -> None:
    """Raise ConfigError unless runs of any task can be compared by a metric."""
    require(metric in (None, EVAL_LOSS), f"metric={metric!r} is not in every record; use {EVAL_LOSS}, or leave it out")


def metric_words(metric: str) -> str:
    """A metric for people, who expect more to be better.

    >>> metric_words("accuracy"), metric_words("eval_loss")
    ('accuracy', 'eval_loss (lower is better)')
    """
    return f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; looked up without importing them.

    >>> "python" in collect_versions()
    True
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or a source tree that was not installed
    return versions


def machine() -> dict[str, str | int]:
    """The kind of machine: processor architecture, cores this process may use, operating system. No names, no paths.

    >>> sorted(machine())
    ['architecture', 'cores', 'system']
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"architecture": platform.machine(), "cores": cores, "system": platform.system()}

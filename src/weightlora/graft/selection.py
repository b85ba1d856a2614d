"""The result of a selection as data: which adapters live, with which gate, rank and scale, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from weightlora.decoding import decode
from weightlora.errors import CheckpointError, ConfigError
from weightlora.files import write_text
from weightlora.graft.adapters import Adapter
from weightlora.graft.surgery import common
from weightlora.graft.trainers import trainer_block

SCHEMA_VERSION = 1
MAX_RANK = 2**20  # more than any layer has rows: a number beyond it would only fill the memory


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Describe one adapter in a selection: its gate and score at the choice, and its rank and scale after it.

    ``tied`` is the name of the adapter whose A and B it uses from then on (None: its own). ``experts``: as in
    :class:`~weightlora.graft.adapters.Adapter`; not None for a bare parameter.
    """

    name: str
    kept: bool
    omega: float
    score: float | None
    rank: int
    scale: float
    tied: str | None = None
    experts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a method decided, in module order.

    ``choices`` lists all n adapters; :attr:`kept` those that were kept. ``step`` is the optimizer step of the
    choice (0: before training; None: at the end). ``why`` is one sentence for people. ``placement``: the budget,
    and what the kept adapters cost; None if a number of adapters was given.

    >>> s = Selection(method="random", preset="recommended", step=0, why="drawn at random", choices=(
    ...     Choice(name="a", kept=True, omega=1.0, score=None, rank=4, scale=2.0),
    ...     Choice(name="b", kept=False, omega=0.0, score=None, rank=4, scale=2.0)))
    >>> s.names, s.k, s.n
    (('a',), 1, 2)
    >>> Selection.from_json(s.to_json()) == s
    True
    >>> s.lora_config().target_modules, s.lora_config().lora_alpha
    (['a'], 8)
    >>> print(s.to("llama-factory"))
    # 1 of 2 adapters, chosen by random (recommended)
    finetuning_type: lora
    lora_rank: 4
    lora_alpha: 8
    lora_dropout: 0.0
    lora_target: "a"
    """

    method: str
    preset: str
    step: int | None
    why: str
    choices: tuple[Choice, ...]
    placement: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def kept(self) -> tuple[Choice, ...]:
        """The survivors, in module order."""
        return tuple(choice for choice in self.choices if choice.kept)

    @property
    def names(self) -> tuple[str, ...]:
        """Full module names of the survivors."""
        return tuple(choice.name for choice in self.kept)

    @property
    def k(self) -> int:
        """How many adapters live."""
        return len(self.kept)

    @property
    def n(self) -> int:
        """How many there were."""
        return len(self.choices)

    def with_ranks(self, live: Sequence[Adapter]) -> Selection:
        """The same selection with the ranks and scales that the live adapters really have."""
        now = {adapter.name: adapter for adapter in live}
        return replace(
            self,
            choices=tuple(
                replace(
                    c,
                    rank=now[c.name].rank,
                    scale=now[c.name].scale,
                    tied=None if (first := now[c.name].tied) is None else live[first].name,
                )
                if c.name in now
                else c
                for c in self.choices
            ),
        )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the survivors that share their factors, group by group, the owner first."""
        found: dict[str, list[str]] = {}
        for choice in self.kept:
            if choice.tied is not None:
                found.setdefault(choice.tied, [choice.tied]).append(choice.name)
        return tuple(map(tuple, found.values()))

    def lora_config(self, **overrides: Any) -> LoraConfig:
        """Make the same placement as a PEFT ``LoraConfig``, for any other trainer; training starts fresh there.

        Args:
            overrides: any field of ``LoraConfig`` (``task_type``, ``lora_dropout``, ``modules_to_save``, ...).
        """
        if not self.kept:
            raise CheckpointError(
                "the selection keeps no adapter, so there is no LoraConfig for it; select again with k of 1 or more"
            )
        rank, alpha = common(self.kept)
        settings: dict[str, object] = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": [c.name for c in self.kept if c.experts is None],
            "target_parameters": [c.name for c in self.kept if c.experts is not None] or None,
            "rank_pattern": {c.name: c.rank for c in self.kept if c.rank != rank},
            "alpha_pattern": {c.name: c.scale * c.rank for c in self.kept if not math.isclose(c.scale * c.rank, alpha)},
        }
        config = LoraConfig(**{**settings, **overrides})
        # PEFT keeps a set; a list has an order, which makes files and comparisons deterministic.
        if isinstance(config.target_modules, set) and "target_modules" not in overrides:
            config.target_modules = settings["target_modules"]
        return config

    def to(self, trainer: str, **overrides: object) -> str:
        """Write the placement as the block to paste into another trainer's own file.

        Args:
            trainer: ``peft`` or ``unsloth`` (Python); ``trl``, ``axolotl`` or ``llama-factory`` (YAML).
            overrides: any field of ``LoraConfig``, as in :meth:`lora_config`.

        Raises:
            ConfigError: that file has no setting for it (ranks that differ, in ``trl`` and ``llama-factory``).
            CheckpointError: the selection keeps no adapter.
        """
        title = f"{self.k} of {self.n} adapters, chosen by {self.method} ({self.preset})"
        return trainer_block(self.lora_config(**overrides), trainer, title)

    def to_dict(self) -> dict[str, object]:
        """Turn into plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """Turn into strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically."""
        return write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def from_dict(cls, data: object) -> Selection:
        """Read plain data back.

        Raises:
            CheckpointError: a key is missing or has the wrong type, or the schema is a newer one.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"a selection must be a JSON object, not {type(data).__name__}")
        _check_schema(data.get("schema_version"))
        try:
            selection: Selection = decode(cls, data, "")
            selection.check()
        except CheckpointError as error:
            raise CheckpointError(f"the selection is damaged: {error}; select again or use a backup") from None
        return selection

    def check(self) -> None:
        """Raise CheckpointError, naming the adapter, for numbers and ties that no selection holds."""
        _check_schema(self.schema_version)
        size = None if self.placement is None else self.placement.get("micro_batch")
        if size is not None and (type(size) is not int or size < 1):
            raise CheckpointError(f"its micro_batch is {size!r}")
        seen: set[str] = set()
        for c in self.choices:
            numbers = (c.omega, c.scale, 0.0 if c.score is None else c.score)
            for wrong, what in (
                (not all(map(math.isfinite, numbers)), "a number is not finite"),
                (not 1 <= c.rank <= MAX_RANK, "rank must be 1 or more"),
                (c.experts is not None and c.experts < 1, "experts must be 1 or more"),
                (c.tied is not None and c.tied not in seen, "tied to no adapter before it"),
            ):
                if wrong:
                    raise CheckpointError(f"adapter {c.name!r}: {what}")
            seen.add(c.name)

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """Read :meth:`to_json` back."""
        try:
            return cls.from_dict(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the selection is not JSON: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read a file that :meth:`save` wrote."""
        if not isinstance(path, str | Path):
            raise ConfigError(f"{path!r} is no path of a selection; give the file that Selection.save wrote")
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read the selection {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"the selection {path} is not text: {error.reason}") from None


def _check_schema(version: object) -> None:
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"selection schema {version!r} is not supported; this release reads {SCHEMA_VERSION}")


def select(
    live: Sequence[Adapter],
    kept: Sequence[int],
    *,
    omegas: Sequence[float],
    scores: Sequence[float] | None,
    method: str,
    preset: str,
    step: int | None,
    why: str,
) -> Selection:
    """Put a decision (indices to keep) into a record."""
    keep = set(kept)
    return Selection(
        method=method,
        preset=preset,
        step=step,
        why=why,
        choices=tuple(
            Choice(
                name=a.name,
                kept=a.index in keep,
                omega=float(omegas[a.index]),
                score=None if scores is None else float(scores[a.index]),
                rank=a.rank,
                scale=a.scale,
                experts=a.experts,
            )
            for a in live
        ),
    )

"""Everything that defines one run, as plain data: what `train` parses, what `resume` reads back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from weightlora.core import declared, parse_params
from weightlora.errors import CheckpointError, ConfigError
from weightlora.files import write_text
from weightlora.graft import check_path
from weightlora.methods import METHODS, Method, method
from weightlora.tasks import default_max_length

CONFIG = "config.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: task, model, adapters, method, seed, and whatever of ``transformers.TrainingArguments`` was set.

    Args:
        task: as :func:`weightlora.tasks.load_task`; so are ``data_dir`` and all up to ``max_target_length``.
        max_length: tokens per input; 0: what is usual for the task (128 for classification, 384 for SQuAD, ...).
        classify_by: "head" or "answer" (tokens); None: answer tokens for a pretrained decoder, else a new head.
        prompt, label_words: as :func:`weightlora.tasks.by_answer_tokens`.
        split_seed: of the rows that are held out or sampled. Runs of every `seed` see the same rows: seeds vary the
            model and the order, not the task.
        model: as :func:`weightlora.tasks.load_model`.
        targets: "all-linear", "attention", or endings of module names, comma-separated.
        r, alpha, dropout: of every adapter.
        method, preset, settings: as :func:`weightlora.methods.method`.
        seed: of everything random.
        micro_batch, final_micro_batch: examples in one forward pass before and after the seam; None: the batch size.
        engine: as :func:`weightlora.fit`.
        params: a budget of adapter parameters ("123k"), or None. The method's own knobs (rank, K, ...) are turned for
            it, and the scale ``alpha / r`` stays what `alpha` and `r` say.
        training: fields of ``TrainingArguments``, under their own names.

    Raises:
        ConfigError: a value that is not allowed.
    """

    task: str = "docstrings"
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str = "label"
    regression: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    holdout: float | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None
    null_score_diff_threshold: float | None = None
    max_target_length: int | None = None
    max_length: int = 0
    classify_by: str | None = None
    prompt: str | None = None
    label_words: str | None = None
    split_seed: int = 0
    model: str = "minilm"
    targets: str = "all-linear"
    r: int = 8
    alpha: float = 32
    dropout: float = 0.05
    method: str = "weightlora"
    preset: str = "recommended"
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    micro_batch: int | None = None
    final_micro_batch: int | None = None
    engine: str = "auto"
    params: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, declared(RunConfig, f.name, getattr(self, f.name)))
        if not self.max_length:
            object.__setattr__(self, "max_length", default_max_length(self.task))
        for name in ("r", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; use 1 or more")
        if self.classify_by not in (None, "head", "answer"):
            raise ConfigError(f"classify_by={self.classify_by!r} is unknown; use head or answer")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not allowed; use 0 or more and less than 1")
        for name, value in {"alpha": self.alpha, **self.settings, **self.training}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}={value} is not a finite number; use one")
        if self.alpha <= 0:
            raise ConfigError(f"alpha={self.alpha} is not allowed; use a positive number (the paper uses 32)")
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; use 0 or more, below 2^32")
        check_path(self.engine)
        if self.params is not None:
            parse_params(self.params)
        self.make_method()

    def make_method(self) -> Method:
        """The method with this run's settings; one that draws (``random``, growth) gets the run's seed by default."""
        kind = METHODS.get(self.method)
        own = kind.settings() if kind else frozenset()
        seeded = {"seed": self.seed} if "seed" in own else {}
        return method(self.method, self.preset, **{**seeded, **self.settings})

    def with_settings(self, **changes: Any) -> RunConfig:
        """A copy with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def save(self, folder: str | Path, name: str = CONFIG) -> Path:
        """Write ``config.json``."""
        return write_text(Path(folder) / name, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Whether a file is a run's configuration, of this release or another."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(data, dict) and {"schema_version", "task", "model", "method", "training"} <= set(data)

    @classmethod
    def load(cls, folder: str | Path) -> RunConfig:
        """Read ``config.json`` of a run directory.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = Path(folder) / CONFIG
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise CheckpointError(
                f"{folder} is not a run directory: it has no {CONFIG}; start a run with `train`"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or data.pop("schema_version", None) != SCHEMA_VERSION or set(data) - known:
            raise CheckpointError(f"{path} is not a run configuration of this release (schema {SCHEMA_VERSION})")
        for name, value in data.items():
            try:
                declared(cls, name, value)
            except ConfigError as error:
                raise CheckpointError(
                    f"{path} is damaged: {error}; or restore the file, or start another run"
                ) from None
        try:
            return cls(**data)
        except TypeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None

"""One description of a run, merged once from mappings and checked once: what `train` is told, what `resume` reads."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import CheckpointError, ConfigError
from weightlora.files import read_object, write_text
from weightlora.settings import check, flat_name, plain, setting, typed
from weightlora.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from weightlora.methods import Method

CONFIG = "config.json"
SCHEMA_VERSION = 1
DEFAULT_METHOD = "weightlora+"  # what docs/evidence.md supports: the same memory as weightlora, nearer to LoRA's loss


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Describe the base and its adapters.

    Args:
        name: as :func:`weightlora.tasks.load_model`.
        targets: "all-linear", "attention", "experts" (of a mixture), "vision", or endings of module names,
            comma-separated.
        r, alpha, dropout: of every adapter.
        dtype: of the base's weights; None: the checkpoint's.
        params: a budget of adapter parameters ("123k"), or None. It sets the method's rank or K; the scale
            ``alpha / r`` stays that of `alpha` and `r`.

    Raises:
        ConfigError: a value that is not allowed.
    """

    name: str = setting(
        "minilm",
        "minilm (default), smollm2, a small shape such as bert-tiny-shape, a hub name, or a folder",
        flag="model",
    )
    targets: str = setting(
        "all-linear",
        "layers with adapters: all-linear (default), attention, experts, vision, or endings of module names,"
        " comma-separated",
    )
    r: int = setting(8, "rank of every adapter (default: 8)", least=1)
    alpha: float = setting(32, "LoRA alpha (default: 32)", above=0, use="a positive number (the paper uses 32)")
    dropout: float = setting(0.05, "LoRA dropout (default: 0.05)", least=0, below=1)
    # float16 would need gradients that are scaled, which scores do not survive.
    dtype: str | None = setting(
        None,
        "dtype of the base's weights: float32 or bfloat16 (default: the checkpoint's)",
        choices=("float32", "bfloat16"),
    )
    params: str | None = setting(
        None, "number of adapter parameters, such as 123k: sets the method's rank or K", metavar="N"
    )

    def __post_init__(self) -> None:
        from weightlora.core.budget import parse_params

        check(self)
        if self.params is not None:
            parse_params(self.params)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Describe the method: its name, a preset, and its own settings on top, as :func:`weightlora.methods.method`.

    Raises:
        ConfigError: an unknown method, preset or setting, or a value that is not allowed.
    """

    name: str = setting(DEFAULT_METHOD, flag="method")
    preset: str = setting("recommended", "recommended (default), paper or official")
    settings: dict[str, object] = setting({})

    def __post_init__(self) -> None:
        check(self)
        _check_finite(self.settings)
        self.make(0)

    def make(self, seed: int) -> Method:
        """The method; one that draws (``random``, growth) gets the run's seed where none is set."""
        from weightlora.methods import METHODS, method

        kind = METHODS.get(self.name)
        seeded = {"seed": seed} if kind and "seed" in kind.settings() else {}
        return method(self.name, self.preset, **{**seeded, **self.settings})


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Describe the training.

    Args:
        seed: of everything random.
        micro_batch, final_micro_batch: examples in one forward pass before and after the seam; None: the batch size.
        engine: as :func:`weightlora.fit`.
        arguments: fields of ``transformers.TrainingArguments``, under their own names.

    Raises:
        ConfigError: a value that is not allowed.
    """

    seed: int = setting(0, "seed of all random choices (default: 0)", least=0, below=2**32, use="0 or more, below 2^32")
    micro_batch: int | None = setting(
        None, "examples per forward pass until adapters are removed; the batch of a step stays the same", metavar="N"
    )
    final_micro_batch: int | None = setting(None, "examples per forward pass after adapters were removed", metavar="N")
    engine: str = setting(
        "auto",
        "code that computes the adapters: auto (default), autograd, triton, reference, or stock (PEFT's own)",
    )
    arguments: dict[str, object] = setting({}, flag="training")

    def __post_init__(self) -> None:
        from weightlora.graft.fast import check_path

        check(self)
        _check_finite(self.arguments)
        check_path(self.engine)


PARTS: dict[str, type] = {"task": TaskSpec, "model": ModelSpec, "method": MethodSpec, "training": TrainingSpec}


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Describe one run: task, model with adapters, method, training. Immutable; every part owns and checks its fields.

    >>> RunSpec.of({"task": "sst2", "r": 4}, {"r": 16, "k": 9}).model.r
    16
    """

    task: TaskSpec = field(default_factory=TaskSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    method: MethodSpec = field(default_factory=MethodSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)

    @classmethod
    def of(cls, *overlays: Mapping[str, Any], lenient: bool = False) -> RunSpec:
        """Merge mappings of settings into a run; later ones win.

        Args:
            overlays: names are fields of the parts ("task", "model" and "method" are their names), settings of the
                method, and fields of ``TrainingArguments``; values may be text, as on a command line. "method" may be
                "name:preset". "settings" and "training" may hold mappings, as a stored run has them.
            lenient: leave out settings that the method does not have and another one has. Without it that is so for
                `k` alone, which a script gives to every method.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        settings: dict[str, object] = {}
        training: dict[str, object] = {}
        home = _homes()
        for name, value in (pair for overlay in overlays for pair in overlay.items()):
            if name == "settings":
                settings |= value
            elif name == "training":
                training |= value
            elif name == "method":
                method, _, preset = str(value).partition(":")
                parts["method"] |= {"name": method} | ({"preset": preset} if preset else {})
            elif name in home:
                part, field_name = home[name]
                parts[part] |= typed(PARTS[part], {field_name: value})
            elif name in training_fields():
                training[name] = training_value(name, value)
            else:
                settings[name] = value
        own = _settings_of(parts["method"].get("name", DEFAULT_METHOD), settings, lenient)
        return cls(
            task=TaskSpec(**parts["task"]),
            model=ModelSpec(**parts["model"]),
            method=MethodSpec(**parts["method"], settings=own),
            training=TrainingSpec(**parts["training"], arguments=training),
        )

    def but(self, **changes: object) -> RunSpec:
        """A copy with other values, named as in :meth:`of`; "settings" and "training" replace what there was."""
        made: dict[str, dict[str, object]] = {}
        for name, value in changes.items():
            part, field_name = _homes()[name]
            made.setdefault(part, {})[field_name] = value
        return replace(self, **{part: replace(getattr(self, part), **values) for part, values in made.items()})

    def with_training(self, **arguments: object) -> RunSpec:
        """A copy with some more fields of ``TrainingArguments``."""
        return self.but(training={**self.training.arguments, **arguments})

    def make_method(self) -> Method:
        """The method with this run's settings."""
        return self.method.make(self.training.seed)

    def values(self) -> dict[str, Any]:
        """All fields by their names among all; the same as an overlay of :meth:`of`."""
        found = {name: getattr(getattr(self, part), own) for name, (part, own) in _homes().items()}
        return {name: deepcopy(value) if isinstance(value, dict) else value for name, value in found.items()}

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"schema_version": SCHEMA_VERSION, **self.values()}

    def save(self, folder: str | Path, name: str = CONFIG) -> Path:
        """Write ``config.json``."""
        return write_text(Path(folder) / name, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Say whether a file is a run's configuration, of this release or another."""
        data = read_object(Path(path)) or {}
        return {"schema_version", "task", "model", "method", "training"} <= set(data)

    @classmethod
    def load(cls, folder: str | Path) -> RunSpec:
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
        known = {"schema_version", *_homes()}
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION or set(data) - known:
            raise CheckpointError(f"{path} is not a run configuration of this release (schema {SCHEMA_VERSION})")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise CheckpointError(f"{path} is damaged: {error}; or restore the file, or start another run") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> RunSpec:
        """The run that :meth:`to_dict` made plain. Text is no number here.

        Raises:
            ConfigError: a value that is not allowed.
        """
        parts: dict[str, dict[str, object]] = {part: {} for part in PARTS}
        for name, (part, field_name) in _homes().items():
            if name in data:
                parts[part][field_name] = data[name]
        return cls(**{part: PARTS[part](**values) for part, values in parts.items()})


@cache
def _homes() -> dict[str, tuple[str, str]]:
    """``{name among all fields: (part, name there)}``."""
    return {flat_name(each): (part, each.name) for part, kind in PARTS.items() for each in fields(kind)}


@cache
def training_fields() -> frozenset[str]:
    """Names of the fields of ``TrainingArguments``."""
    from transformers import Seq2SeqTrainingArguments

    return frozenset(each.name for each in fields(Seq2SeqTrainingArguments))


def training_value(name: str, value: object) -> object:
    """The value of a field of ``TrainingArguments``, text read as on a command line.

    Raises:
        ConfigError: the field has no such value.
    """
    return training_values([f"--{name}", value])[0][name] if isinstance(value, str) else plain(value)


def training_values(words: list[str]) -> tuple[dict[str, object], list[str]]:
    """The fields of ``TrainingArguments`` that words of a command line name, and the words that are none.

    Raises:
        ConfigError: a field has no such value.
    """
    parser = _training_parser()
    found, rest = parser.parse_known_args(words)
    return vars(found), rest


@cache
def _training_parser() -> HfArgumentParser:
    import argparse

    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

    parser = HfArgumentParser(Seq2SeqTrainingArguments, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        raise ConfigError(message)

    parser.error = refuse  # type: ignore[assignment]
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _settings_of(name: str, given: Mapping[str, object], lenient: bool) -> dict[str, object]:
    """Those of some settings that a method has, text read as its fields have it."""
    from weightlora.methods import METHODS

    kind = METHODS.get(name)
    if kind is None:
        return dict(given)  # the method's name is refused next
    own, known = kind.settings(), frozenset().union(*(each.settings() for each in METHODS.values()))
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, [*_homes(), *known, *training_fields()], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no setting {key!r} of task, model, method or training{hint}")
    kept = {key: value for key, value in given.items() if key in own or not (lenient or key == "k")}
    return {**kept, **typed(kind, {key: value for key, value in kept.items() if key in own})}


def _check_finite(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} is not allowed; use a finite number")

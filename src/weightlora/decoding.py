"""Dataclasses as strict JSON and back: what is read is checked against the types that their fields declare."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from weightlora.errors import CheckpointError, ConfigError

_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number"}
_NAMES |= {float: "a number", type(None): "null"}

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with a message unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def refuse_constant(name: str) -> float:
    """For ``json.loads``: NaN and the infinities are no JSON."""
    raise ValueError(f"{name} is not JSON")


def to_plain(value: object, where: str) -> object:
    """``value`` as what `json` writes, or ConfigError naming the place that is not plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        for key in value:
            require(isinstance(key, str), f"{where} has the key {key!r}; JSON keys are text")
        return {key: to_plain(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    allowed = value is None or isinstance(value, (str, bool, int))
    require(allowed, f"{where} is a {type(value).__name__}; a record holds text, numbers, lists and dictionaries only")
    return value


def decode_part(hint: type[T], data: Mapping[str, object], key: str, file: object) -> T:
    """Decode one entry of a manifest's data as the type `hint` says.

    Raises:
        CheckpointError: it is not there, or damaged; the message names the file.
    """
    if key not in data:
        raise CheckpointError(f"{file}: the manifest is damaged: it has no key {key!r}")
    try:
        return decode(hint, data[key], key)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: the manifest is damaged: {error}") from None


def decode(hint: type[T], value: object, where: str) -> T:
    """``value`` (from JSON) as the type ``hint`` says, or CheckpointError naming ``where``."""
    return cast(T, _decode(hint, value, where))


def _decode(hint: type, value: object, where: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_object(hint, _expect(dict, value, where), where)
    if origin in (tuple, dict):
        return _decode_items(origin, arguments, value, where)
    if origin in (types.UnionType, typing.Union):
        fitting = [argument for argument in arguments if argument is type(value)]
        return _decode(fitting[0] if fitting else arguments[0], value, where)
    if origin is Literal and value not in arguments:
        raise CheckpointError(f"key '{where}' is {value!r}; allowed are {', '.join(arguments)}")
    if hint is float:
        return _decode_float(value, where)
    return value if hint in (Any, object) or origin is Literal else _expect(hint, value, where)


def _decode_items(origin: type, arguments: tuple[type, ...], value: object, where: str) -> object:
    """A tuple from a JSON list, or a dictionary from a JSON object."""
    if origin is tuple:
        items = value if isinstance(value, tuple) else _expect(list, value, where)
        hints = arguments[:1] * len(items) if arguments[1:] == (...,) else arguments
        if len(hints) != len(items):
            raise CheckpointError(f"key '{where}' must be a list of {len(hints)}, not of {len(items)}")
        return tuple(
            _decode(hint, item, f"{where}[{index}]")
            for index, (hint, item) in enumerate(zip(hints, items, strict=True))
        )
    return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}


def _decode_object(hint: type, data: dict[str, object], where: str) -> object:
    """The dataclass ``hint`` from a JSON object; unknown keys are ignored."""
    hints, optional = _schema(hint)
    dot = f"{where}." if where else ""
    for name in hints:
        if name not in data and name not in optional:
            raise CheckpointError(f"it has no key '{dot}{name}'")
    return hint(**{name: _decode(kind, data[name], f"{dot}{name}") for name, kind in hints.items() if name in data})


@functools.cache
def _schema(kind: type) -> tuple[dict[str, type], frozenset[str]]:
    """The types of a dataclass's fields, and which of them may be left out."""
    optional = {f.name for f in dataclasses.fields(kind) if f.default_factory is not dataclasses.MISSING}
    return typing.get_type_hints(kind), frozenset(optional)


def _decode_float(value: object, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"key '{where}' must be a number, not {kind_of(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise CheckpointError(f"key '{where}' is a whole number too large for a float") from error


def _expect(kind: type[T], value: object, where: str) -> T:
    if type(value) is not kind:
        if not where:
            raise CheckpointError(f"it must be {_NAMES[kind]}, not {kind_of(value)}")
        raise CheckpointError(f"key '{where}' must be {_NAMES[kind]}, not {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    return _NAMES.get(type(value), type(value).__name__)

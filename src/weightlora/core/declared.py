"""Settings as their declarations have them: what other libraries' numbers and paths become, and what is refused."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union

from weightlora.errors import ConfigError

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    tuple: "a list of whole numbers",
    dict: "a mapping",
    NoneType: "None",
}


def declared(cls: type, name: str, value: Any) -> Any:
    """The value of a dataclass's field in the type that the field declares.

    NumPy's numbers become Python's, a path becomes text where text is declared, a list a tuple. Nothing is guessed:
    text is no number, and 8.0 is no count.

    Raises:
        ConfigError: the field declares other types.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     rate: float = 0.0
    >>> declared(Settings, "rate", 5)
    5
    >>> declared(Settings, "rate", "5")
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: rate='5' is not allowed; use a number
    """
    kinds = _kinds(cls)[name]
    value = plain(value)
    if str in kinds and isinstance(value, PurePath):
        value = str(value)
    if tuple in kinds and isinstance(value, list):
        value = tuple(value)
    fits = isinstance(value, tuple(kinds)) or (isinstance(value, int) and float in kinds)
    if not fits or (isinstance(value, bool) and bool not in kinds) or (isinstance(value, tuple) and not _whole(value)):
        words = [_WORDS[kind] for kind in kinds if not (kind is int and float in kinds)]
        raise ConfigError(f"{name}={value!r} is not allowed; use {' or '.join(words)}")
    return value


def plain(value: Any) -> Any:
    """Numbers of other libraries as Python's own, inside lists and mappings too; everything else as it is.

    >>> import torch
    >>> plain({"k": [3, 0.5], "rest": torch.int8})
    {'k': [3, 0.5], 'rest': torch.int8}
    """
    if isinstance(value, Mapping):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(held) for held in value) if type(value) in (list, tuple) else value
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _whole(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


@cache
def _kinds(cls: type) -> dict[str, list[type]]:
    """The types that every annotated name of a class declares."""
    return {name: list(dict.fromkeys(_flat(hint))) for name, hint in typing.get_type_hints(cls).items()}


def _flat(hint: Any) -> list[type]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return [kind for part in parts for kind in _flat(part)]
    if origin is Literal:
        return [type(part) for part in parts]
    return [origin or hint]

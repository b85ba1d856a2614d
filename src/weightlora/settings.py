"""Declare a setting once: its field says type, bounds, help and owners; checks, flags and overlays follow from it."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, Union

from weightlora.errors import ConfigError

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    tuple: "a list of whole numbers",
    list: "a list",
    dict: "a mapping",
    NoneType: "None",
}


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


def setting(  # noqa: PLR0913 - one argument per fact about a field
    default: object = MISSING,
    help: str = "",
    *,
    metavar: str | None = None,
    flag: str | None = None,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    only: Sequence[str] = (),
    use: str = "",
) -> Any:
    """Declare a field of a frozen dataclass whose values are checked by :func:`check`.

    Args:
        default: of the field; a mapping is copied for each object.
        help: what the command line says of it; "" for a field without a flag.
        metavar: the name of its value there.
        flag: the flag's name, where it is not the field's.
        choices: the words that are allowed, beside None where the type allows it; a Literal says them itself.
        least, most, above, below: bounds of a number; `above` and `below` are not allowed themselves.
        only: names of the tasks that have it; empty: all.
        use: what to use instead of a value that is out of bounds; "" for words made from the bounds.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    about = {"help": help, "metavar": metavar, "flag": flag, "choices": tuple(choices), "only": tuple(only), "use": use}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={**about, **given})
    return field(default=default, metadata={**about, **given})


def flat_name(each: Field[object]) -> str:
    """The name of a field as a flag, and among the fields of all specs of a run."""
    return each.metadata.get("flag") or each.name


def typed(cls: type, values: Mapping[str, object]) -> dict[str, Any]:
    """Read values of fields as recipes and command lines have them: text as :func:`from_text`, lists for text joined.

    Raises:
        ConfigError: a field's type has no such value.
    """
    found = dict(values)
    for name, value in values.items():
        kinds = _kinds(cls)[name]
        if isinstance(value, list) and str in kinds and not {list, tuple} & set(kinds):
            found[name] = ",".join(map(str, value))
        elif isinstance(value, str):
            found[name] = from_text(cls, name, value)
    return found


def check(settings: _Dataclass) -> None:
    """Bring every field of a frozen dataclass into its declared type, and within its bounds.

    Raises:
        ConfigError: a value that is not allowed; the message says what is.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Adapter:
    ...     r: int = setting(8, "rank", least=1)
    ...     def __post_init__(self):
    ...         check(self)
    >>> Adapter(r=0)
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: r=0 is not allowed; use 1 or more
    """
    for each in fields(settings):
        value = declared(type(settings), each.name, getattr(settings, each.name))
        object.__setattr__(settings, each.name, value)
        words = each.metadata.get("choices") or _literals(type(settings))[each.name]
        if value is not None and words and value not in words:
            raise ConfigError(f"{each.name}={value!r} is unknown; use one of {', '.join(words)}")
        if each.metadata and isinstance(value, int | float) and not isinstance(value, bool):
            _check_bounds(each, value)


def _check_bounds(each: Field[object], value: float) -> None:
    about = each.metadata
    fits = (
        (isinstance(value, int) or math.isfinite(value))
        and about.get("least", value) <= value <= about.get("most", value)
        and not value <= about.get("above", -math.inf)
        and not value >= about.get("below", math.inf)
    )
    if not fits:
        words = {"least": "{:g} or more", "above": "more than {:g}", "most": "at most {:g}", "below": "less than {:g}"}
        bounds = " and ".join(text.format(about[name]) for name, text in words.items() if name in about)
        bounds += ", or None" if bounds and each.default is None else ""
        raise ConfigError(f"{each.name}={value} is not allowed; use {about['use'] or bounds or 'a finite number'}")


def from_text(cls: type, name: str, text: str) -> bool | int | float | str | tuple[int, ...]:
    """Read the value of a field from a word of a command line or a recipe.

    Raises:
        ConfigError: the field's type has no such value.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Kept:
    ...     k: int | float = 0.25
    >>> from_text(Kept, "k", "9"), from_text(Kept, "k", "5e-1")
    (9, 0.5)
    """
    kinds = _kinds(cls)[name]
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if tuple in kinds:
        return wholes(text, name)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    words = [_WORDS[kind] for kind in kinds if kind is not NoneType and not (kind is int and float in kinds)]
    raise ConfigError(f"{name}={text!r} is not allowed; use {' or '.join(words)}")


def wholes(listed: object, what: str) -> tuple[int, ...]:
    """Read whole numbers of 0 or more, from a list or from text.

    >>> wholes("0,1,2", "seeds"), wholes([3], "seeds")
    ((0, 1, 2), (3,))
    """
    found = []
    for text in _items(listed):
        if not text.isdecimal():
            raise ConfigError(f"{what}={text!r} is no whole number; use for example 0,1,2")
        found.append(int(text))
    return tuple(found)


def numbers(listed: object, what: str) -> tuple[float, ...]:
    """Read numbers, from a list or from text."""
    try:
        return tuple(float(text) for text in _items(listed))
    except ValueError:
        raise ConfigError(f"{what}={listed!r} is no list of numbers; use for example 3e-4,1e-3") from None


def _items(listed: object) -> list[str]:
    parts = listed if isinstance(listed, list | tuple) else [] if listed is None else str(listed).split(",")
    return [text for part in parts if (text := str(part).strip())]


def declared(cls: type, name: str, value: object) -> object:
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


def plain(value: object) -> object:
    """Numbers of other libraries as Python's own, inside lists and mappings too; everything else as it is.

    >>> import torch
    >>> plain({"k": [3, 0.5], "rest": torch.int8})
    {'k': [3, 0.5], 'rest': torch.int8}
    """
    if value is None or type(value) in (str, bool, int, float):  # nearly always: asking for an abstract type takes long
        return value
    if isinstance(value, Mapping):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(held) for held in value) if type(value) in (list, tuple) else value
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _whole(values: tuple[object, ...]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


@cache
def _kinds(cls: type) -> dict[str, list[type]]:
    """The types that every annotated name of a class declares."""
    return {name: list(dict.fromkeys(_flat(hint))) for name, hint in typing.get_type_hints(cls).items()}


@cache
def _literals(cls: type) -> dict[str, tuple[str, ...]]:
    """The words that every annotated name of a class declares; () for other types."""
    hints = typing.get_type_hints(cls).items()
    return {name: typing.get_args(hint) if typing.get_origin(hint) is Literal else () for name, hint in hints}


def _flat(hint: type) -> list[type]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return [kind for part in parts for kind in _flat(part)]
    if origin is Literal:
        return [type(part) for part in parts]
    return [origin or hint]

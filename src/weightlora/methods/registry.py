"""The methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, MutableMapping

from weightlora import methods
from weightlora.errors import ConfigError
from weightlora.methods.base import Method
from weightlora.methods.names import NAMES


class _Registry(MutableMapping[str, type[Method]]):
    """Ours are looked up when asked for, because this room may still be loading; a user's own are held."""

    def __init__(self) -> None:
        self._held: dict[str, type[Method] | None] = dict.fromkeys(NAMES)

    def __getitem__(self, name: str) -> type[Method]:
        held = self._held[name]
        return getattr(methods, NAMES[name]) if held is None else held

    def __setitem__(self, name: str, kind: type[Method]) -> None:
        self._held[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


METHODS: MutableMapping[str, type[Method]] = _Registry()


def method(name: str, preset: str = "recommended", **settings: object) -> Method:
    """The method called `name` with a preset's values and your own settings on top.

    Raises:
        ConfigError: unknown name (with the nearest one), preset or setting.

    >>> method("random", k=5, seed=1).k
    5
    """
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if str(name).endswith((".yaml", ".yml")):
            hint = f"a recipe is the first word: weightlora train {name}; "
        raise ConfigError(f"method {name!r} is unknown; {hint}the methods are {', '.join(METHODS)}")
    return METHODS[name].from_preset(preset, **settings)

"""The methods by name."""

from __future__ import annotations

import difflib

from weightlora import methods
from weightlora.errors import ConfigError
from weightlora.methods.base import Method
from weightlora.methods.names import NAMES

METHODS: dict[str, type[Method]] = {name: getattr(methods, kind) for name, kind in NAMES.items()}


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

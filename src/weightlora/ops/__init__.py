"""How one adapter's contribution is computed. Decides nothing about which adapter lives."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.ops import autograd, reference

Engine = Literal["autograd", "reference"]


class AdapterPath(Protocol):
    """``(x, result, A, B, gate, scale, dropout) -> result + s w (drop(x) A^T) B^T``."""

    def __call__(
        self, x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
    ) -> Tensor: ...


ENGINES: dict[str, AdapterPath] = {"autograd": autograd.adapter_path, "reference": reference.adapter_path}


def engine(name: Engine = "autograd") -> AdapterPath:
    """The adapter path called `name`.

    >>> engine("reference") is reference.adapter_path
    True
    """
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is unknown; use one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name]


__all__ = ["ENGINES", "AdapterPath", "Engine", "engine"]

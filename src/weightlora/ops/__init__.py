"""How one adapter's contribution is computed. Decides nothing about which adapter lives."""

from __future__ import annotations

import functools
import logging
from typing import Literal, Protocol

import torch
from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.ops import autograd, reference

log = logging.getLogger("weightlora")

Engine = Literal["auto", "autograd", "reference", "triton"]


class AdapterPath(Protocol):
    """``(x, result, A, B, gate, scale, dropout) -> result + s w (drop(x) A^T) B^T``; `result` is taken over."""

    def __call__(
        self, x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
    ) -> Tensor: ...


# Those that run anywhere; "triton" and "auto" are added by `engine`.
ENGINES: dict[str, AdapterPath] = {"autograd": autograd.adapter_path, "reference": reference.adapter_path}


def engine(name: Engine = "autograd") -> AdapterPath:
    """The adapter path called `name`.

    Args:
        name: "autograd": lean, any device. "reference": the formula, as PEFT computes it. "triton": lean, with CUDA
            kernels of its own.
            "auto": "triton" where it can run, else "autograd"; what it chose is logged once, on a GPU.

    Raises:
        ConfigError: the name is unknown, or "triton" was asked for where it cannot run; the reason is given.

    >>> engine("reference") is reference.adapter_path
    True
    """
    if name in ENGINES:
        return ENGINES[name]
    if name not in ("auto", "triton"):
        raise ConfigError(f"engine {name!r} is unknown; use one of {', '.join(sorted((*ENGINES, 'auto', 'triton')))}")
    reason = why_no_triton()
    if name == "auto":
        return _automatic(reason)
    if reason is not None:
        raise ConfigError(f"engine 'triton' cannot run: {reason}; use engine='autograd'")
    from weightlora.ops import triton_path

    return triton_path.adapter_path


def why_no_triton() -> str | None:
    """Why the Triton engine cannot run here, or None where it can."""
    from weightlora.ops import triton_path

    if triton_path.triton is None:
        return "the package triton is not installed"
    return None if triton_path.INTERPRETED or torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def _automatic(reason: str | None) -> AdapterPath:
    if reason is None:
        from weightlora.ops import triton_path

        log.info("adapter path: triton")
        return triton_path.adapter_path_or_torch
    # Of a CPU there is nothing to say: no other engine could run there.
    log.log(logging.INFO if torch.cuda.is_available() else logging.DEBUG, "adapter path: autograd (%s)", reason)
    return autograd.adapter_path


__all__ = ["ENGINES", "AdapterPath", "Engine", "engine", "why_no_triton"]

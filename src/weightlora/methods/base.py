"""One interface for every method: a frozen config says what is wanted, a policy decides while training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightlora.core import resolve_k
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft import Adapter, Gates, Selection, select

PRESETS = ("recommended", "paper", "official")


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a policy may look at in one optimizer step. Gradients are there; nothing may be kept beyond the call.

    ``step`` counts from 1; ``lr_factor`` is the schedule's current learning rate over its peak; ``factors`` are the
    live ``(A, B)`` of every adapter in module order; ``gates`` is None for a method without gates.
    """

    step: int
    lr_factor: float
    factors: tuple[tuple[Tensor, Tensor], ...]
    gates: Gates | None


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """How the survivors grow at the seam: new ranks by module name, and arguments of :func:`weightlora.core.grow`."""

    ranks: Mapping[str, int]
    mode: Any
    generator: torch.Generator
    options: Mapping[str, Any]


class Policy(ABC):
    """The decisions of one run. Abstract methods are overridden, nothing else is.

    ``seam`` is the optimizer step after which surgery happens: 0 before training, None never (then :meth:`decide` is
    asked once, at the end). ``gated`` says whether the run needs the omega vector.
    """

    seam: int | None = None
    gated: bool = False
    trains_gates: bool = False

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters

    def prepare(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Before the first step: change initial values, if the method asks for it."""

    def before_step(self, view: StepView) -> None:
        """Gradients are final (after clipping), the optimizer has not stepped."""

    def after_step(self, view: StepView) -> None:
        """The optimizer has stepped, gradients are still there."""

    def held(self) -> Sequence[int]:
        """Adapters whose A and B must not move in the coming step (their gradient is withheld from the optimizer)."""
        return ()

    @abstractmethod
    def decide(self, omegas: Sequence[float]) -> Selection:
        """Which adapters live, and why. `omegas` are the gates (all 1 without gates)."""

    def growth(self, selection: Selection) -> GrowthPlan | None:
        """How the survivors grow, or None."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside weights and gates."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method's settings. ``preset`` names where the values come from; see :meth:`from_preset`."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    uses_adapters: ClassVar[bool] = True

    preset: str = "recommended"

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Any:
        """The method with a preset's values; any field can be overridden.

        Raises:
            ConfigError: unknown preset, or a field that the method does not have.
        """
        check_choice("preset", preset, PRESETS)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ConfigError(
                f"{cls.name} has no setting {unknown[0]!r}; it has {', '.join(sorted(known - {'preset'})) or 'none'}"
            )
        return cls(**{**cls.presets.get(preset, {}), **overrides, "preset": preset})

    @abstractmethod
    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        """Check that the method can run on these adapters in this many optimizer steps, and start it.

        Raises:
            ScheduleError: it cannot; the message says what would.
        """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the method's name and settings."""
        return {"name": self.name, **asdict(self)}

    def choose(
        self,
        live: Sequence[Adapter],
        kept: Sequence[int],
        why: str,
        *,
        step: int | None,
        omegas: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
    ) -> Selection:
        """A decision as a record that carries the method's name."""
        return select(
            live,
            kept,
            omegas=[1.0] * len(live) if omegas is None else omegas,
            scores=scores,
            method=self.name,
            preset=self.preset,
            step=step,
            why=why,
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that the setting `name` does not know.

    >>> check_choice("rule", "best", ("signed", "positive"))
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: rule 'best' is unknown; use one of signed, positive
    """
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is unknown; use one of {', '.join(allowed)}")


def check_k_value(k: int | float) -> None:
    """Refuse a ``k`` that no model could satisfy.

    >>> check_k_value(0)
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: k=0 is not allowed; use a count of adapters (1 or more) or a share such as 0.25
    """
    number = isinstance(k, int | float) and not isinstance(k, bool)
    if not number or not (0 < k <= 1 if isinstance(k, float) else k >= 1):
        raise ConfigError(f"k={k!r} is not allowed; use a count of adapters (1 or more) or a share such as 0.25")


def check_k(k: int | float, live: Sequence[Adapter]) -> int:
    """``k`` as a count, or a ScheduleError that says what the model allows."""
    try:
        return resolve_k(k, len(live))
    except ConfigError as error:
        raise ScheduleError(str(error)) from None


def check_warmup(steps: int | float, max_steps: int, name: str = "warmup_steps") -> int:
    """A warm-up length T in optimizer steps; a fraction means a share of the run. `name` is for messages.

    Raises:
        ScheduleError: T is not inside the run.

    >>> check_warmup(0.1, 300), check_warmup(50, 300)
    (30, 50)
    """
    if isinstance(steps, bool) or not isinstance(steps, int | float) or steps <= 0:
        raise ScheduleError(f"{name}={steps!r} is not allowed; use a number of steps (1 or more) or a share below 1")
    count = max(1, round(steps * max_steps)) if isinstance(steps, float) and steps < 1 else int(steps)
    if count != steps and not (isinstance(steps, float) and steps < 1):
        raise ScheduleError(f"{name}={steps!r} is neither a whole number of steps nor a share below 1")
    if count >= max_steps:
        raise ScheduleError(
            f"{name}={steps} needs more than the {max_steps} optimizer steps of this run;"
            f" use at most {max_steps - 1}, a share such as 0.1, or train longer"
        )
    return count

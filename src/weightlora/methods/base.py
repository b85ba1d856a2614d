"""One interface for every method: a frozen config says what is wanted, a policy decides while training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from weightlora.core import PlacementCosts, k_for_params, rank_for_params, resolve_k, total_params
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft import Adapter, Form, Gates, RankGates, Selection, select

PRESETS = ("recommended", "paper", "official")
Factors = Sequence[tuple[Tensor, Tensor]]


class HeldOut(Protocol):
    """Batches of training rows that the run does not train on. Looking at them leaves no trace: dropout is off, and the
    random state, the mode and the gradients of the model are as before."""

    def __len__(self) -> int: ...

    def loss(self, index: int) -> Tensor:
        """The model's mean loss on one batch, as it is now; with a graph where the caller's grad mode allows."""
        ...

    def output_energy(self, index: int) -> Tensor:
        """``sum over tokens of ||dW_i x||^2`` of every adapter on one batch, ``(n,)`` float64."""
        ...

    def input_size(self, index: int) -> Sequence[Tensor]:
        """``mean over tokens of |x_j|`` of every adapter's inputs on one batch, each ``(d_in,)`` float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a policy may look at in one optimizer step. Gradients are there; nothing may be kept beyond the call.

    ``step`` counts from 1; ``lr_factor`` is the schedule's current learning rate over its peak; ``factors`` are the
    live ``(A, B)`` of every adapter in module order; ``gates`` is None for a method without omega, ``form`` for one
    without a form. ``products`` are sums of ``|dW * dL/ddW|`` per adapter since the last step, for a policy that asked
    (``watches``); ``held_out`` the batches that it asked for.
    """

    step: int
    lr_factor: float
    factors: tuple[tuple[Tensor, Tensor], ...]
    gates: Gates | None
    form: Form | None = None
    products: Tensor | None = None
    held_out: HeldOut | None = None

    @property
    def ranks(self) -> RankGates:
        """The rank gates of a policy whose form they are."""
        assert isinstance(self.form, RankGates)
        return self.form


@dataclass(frozen=True, kw_only=True)
class Room:
    """What placements cost and may cost at one micro-batch (None: the same at any)."""

    costs: PlacementCosts
    budget: int
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the survivors may cost: ``rooms`` from the wanted micro-batch down. ``kind``: of what; ``facts``: more that
    belongs into the selection's record."""

    kind: Literal["memory", "step_time"]
    rooms: tuple[Room, ...]
    facts: Mapping[str, int | float]


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """How the survivors grow at the seam: new ranks by module name, and arguments of :func:`weightlora.core.grow`."""

    ranks: Mapping[str, int]
    mode: Any
    generator: torch.Generator
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """Entries of one adapter whose optimizer state must start anew: some ranks, or (None) all of it.

    ``gates_only``: of the ranks' gates, not of A and B.
    """

    index: int
    ranks: tuple[int, ...] | None = None
    gates_only: bool = False


class Policy(ABC):
    """The decisions of one run. Abstract methods are overridden; of the others those that the method needs.

    ``seam`` is the optimizer step after which surgery happens: 0 before training, None never (then :meth:`decide` is
    asked once, at the end). ``gated`` says whether the run needs the omega vector, ``watches`` whether it needs
    ``StepView.products`` (False after some step: no more). ``restart``: after the seam the survivors train from LoRA's
    initial values again, drawn from this generator. ``anew``: a regulariser that ends at the seam fills the optimizer's
    memory of A and B, which then starts anew there. ``held_out``: the batches that the method asked for, there from
    :meth:`prepare` on. ``budget``: what survivors may cost, for a method that asked (:attr:`Method.limit`).
    """

    seam: int | None = None
    gated: bool = False
    trains_gates: bool = False
    watches: bool = False
    restart: torch.Generator | None = None
    anew: ClassVar[bool] = False
    held_out: HeldOut | None = None
    budget: Budget | None = None

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters

    # Before the first step, in this order; in a resumed run too, but for `prepare`.

    def check(self, weights: Sequence[Tensor]) -> None:
        """Refuse base layers that the method cannot work on; nothing has been changed yet."""

    def allocate(self) -> Sequence[tuple[int, float]] | None:
        """Rank and scale to give each adapter, or None for those it has. What is added is zero: see :meth:`prepare`."""
        return None

    def ties(self) -> Sequence[Sequence[int]]:
        """Groups of adapters that share A and B from the start."""
        return ()

    def form(self, factors: Factors) -> Form | None:
        """How the factors that compute come about, if not directly."""
        return None

    def prepare(self, factors: Factors, weights: Sequence[Tensor]) -> None:
        """Before the first step of a fresh run: change initial values. `weights` are the base layers' (read only)."""

    # In every step.

    def penalty(self, view: StepView) -> Tensor | None:
        """A term of the loss that depends on the factors and gates alone. Its gradient is added after clipping, once
        per optimizer step, so that neither accumulation nor the task's loss changes its weight."""
        return None

    def before_step(self, view: StepView) -> None:
        """Gradients are final (after clipping), the optimizer has not stepped."""

    def after_step(self, view: StepView) -> None:
        """The optimizer has stepped, gradients are still there."""

    def held(self) -> Sequence[int]:
        """Adapters whose A and B must not move in the coming step (their gradient is withheld from the optimizer)."""
        return ()

    def fresh(self) -> Sequence[Fresh]:
        """What :meth:`after_step` has just changed so that the optimizer's memory of it is no good any more."""
        return ()

    # At the seam, or at the end.

    @abstractmethod
    def decide(self, omegas: Sequence[float]) -> Selection:
        """Which adapters live, and why. `omegas` are the gates (all 1 without gates)."""

    def growth(self, selection: Selection) -> GrowthPlan | None:
        """How the survivors grow, or None."""
        return None

    def live(self, form: Form) -> Sequence[Sequence[int]] | None:
        """For each adapter the ranks that live on; None: all. (An adapter without any must not be selected.)"""
        return form.live() if isinstance(form, RankGates) else None

    def shared(self, selection: Selection) -> Sequence[Sequence[str]]:
        """Groups of survivors that share A and B from the seam on."""
        return ()

    def count(self, live: Sequence[Adapter]) -> int:
        """Numbers that the method has trained for these plain adapters: its parameter formula."""
        return total_params([a.rank for a in live if a.tied is None], [a.shape for a in live if a.tied is None])

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
    # "lora": a policy over plain LoRA adapters. "peft": a tuner of PEFT's own, trained as it is. "full": no adapters.
    trains: ClassVar[Literal["lora", "peft", "full"]] = "lora"
    chooses_k: ClassVar[bool] = False  # how many adapters survive is an outcome, and differs from run to run
    grows: ClassVar[bool] = False  # survivors take over the parameters of all n
    kind: ClassVar[str] = "LORA"  # of the model's PEFT adapters
    rates: ClassVar[Mapping[str, float]] = {}  # learning rates over the run's, by a part of the parameter's name
    in_shares: ClassVar[tuple[str, ...]] = ("warmup_steps",)  # settings that may be shares of the run

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

    @property
    def uses_adapters(self) -> bool:
        """Whether a policy drives plain LoRA adapters."""
        return self.trains == "lora"

    @property
    def held_out_batches(self) -> int:
        """How many batches of training rows must be set aside for the method to look at."""
        return 0

    @property
    def limit(self) -> tuple[Literal["memory", "step_time"], float, str] | None:
        """What the survivors' cost must stay within: of what, how much (bytes, or a share), and as the user wrote it.
        A method with one needs :attr:`Policy.budget`."""
        return None

    def peft_config(self, lora: Any, shapes: Sequence[tuple[int, int]]) -> Any:
        """The PEFT configuration to build the model with, given the ``LoraConfig`` that plain LoRA would use and the
        ``(d_in, d_out)`` of its targets."""
        return lora

    def within(self, params: int, shapes: Sequence[tuple[int, int]], rank: int) -> tuple[Any, int]:
        """This method with its own knobs turned so that it trains at most `params` adapter parameters, and the rank to
        build the model with.

        Args:
            params: the budget.
            shapes: ``(d_in, d_out)`` of each target.
            rank: what the user asked for; a method that spends the budget on ranks replaces it.

        Raises:
            ConfigError: the budget is too small; the message says what is needed.
        """
        return self, rank_for_params(params, shapes)

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


def slope(held_out: HeldOut, index: int, leaf: Tensor) -> Tensor:
    """``dL/dleaf`` on one held-out batch, of gates that training itself leaves alone; nothing is left in ``.grad``."""
    leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(held_out.loss(index), leaf)
    finally:
        leaf.requires_grad_(False)
    return grad


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


def with_k(method: Any, params: int, shapes: Sequence[tuple[int, int]], rank: int) -> tuple[Any, int]:
    """`method` with the largest K such that any K adapters of `rank` stay within `params`; the rank is kept."""
    return replace(method, k=k_for_params(params, rank, shapes)), rank

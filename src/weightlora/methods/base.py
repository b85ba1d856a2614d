"""One interface for every method: a frozen config says what is wanted, a policy decides while training runs."""

from __future__ import annotations

import math
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from weightlora.core import PlacementCosts, rank_for_params, total_params
from weightlora.errors import ConfigError
from weightlora.graft import Adapter, Form, Gates, RankGates, Selection, is_adapter, select
from weightlora.methods.checks import check_choice, check_steps
from weightlora.settings import declared

PRESETS = ("recommended", "paper", "official")
Trains = Literal["lora", "peft", "full", "head", "none"]
"""What a method trains. "lora": a policy over plain LoRA adapters. "peft": a tuner of PEFT's own, as it is. "full":
every weight, without adapters. "head": the head alone, likewise. "none": nothing."""
Factors = Sequence[tuple[Tensor, Tensor]]
Shapes = Sequence[tuple[int, int]]  # (d_in, d_out) of each target
M = TypeVar("M", bound="Method")


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

    def peak(self) -> int | None:
        """The most numbers in adapters that have trained at a time, where not all that is allocated does; else None."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside weights and gates."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""


class _FromPreset(ABCMeta):
    """Fills what the caller leaves out from the preset that he names, before any default of the class."""

    def __call__(cls: type[M], *values: Any, **given: Any) -> M:  # type: ignore[misc]  # a metaclass's self is a class
        known = [*cls.settings(), "preset"]
        allowed = ", ".join(sorted(known, key=lambda name: (name == "preset", name)))
        if values:
            raise ConfigError(f"{cls.name} takes settings by name, not {values[0]!r} alone; they are {allowed}")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"{cls.name} has no setting {unknown[0]!r}; it has {allowed}")
        preset = given.get("preset", "recommended")
        check_choice("preset", preset, PRESETS)
        made: M = type.__call__(cls, **{**cls.presets.get(preset, {}), **given})
        return made


@dataclass(frozen=True, kw_only=True)
class Method(ABC, metaclass=_FromPreset):
    """A method's settings. ``preset`` names where those come from that are not given.

    ``adapter_rate``: the adapters' learning rate, as a multiple of the run's (which is the head's). None: the method's
    own, :attr:`rate`, under the preset `recommended`, otherwise 1. ``b_rate``: that of B, as a multiple of A's (LoRA+,
    Hayou et al. 2024).
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trains: ClassVar[Trains] = "lora"
    chooses_k: ClassVar[bool] = False  # how many adapters survive is an outcome, and differs from run to run
    grows: ClassVar[bool] = False  # survivors take over the parameters of all n
    kind: ClassVar[str] = "LORA"  # of the model's PEFT adapters
    rate: ClassVar[float] = 1.0  # the adapters' learning rate over the run's, under the preset `recommended`
    rates: ClassVar[Mapping[str, float]] = {}  # of some of them over the adapters', by a part of the parameter's name
    spending: ClassVar[str] = "ranks are whole numbers"  # why a budget of parameters may not be met
    in_shares: ClassVar[tuple[str, ...]] = ("select_after",)  # settings that may be shares of the run
    # What every run says for itself: no preset is changed by it, unless the preset has a value for it.
    asked: ClassVar[tuple[str, ...]] = ("k", "memory", "step_time", "spend", "seed")

    preset: str = "recommended"
    adapter_rate: float | None = None
    b_rate: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, declared(type(self), f.name, getattr(self, f.name)))
            if f.name in self.in_shares:
                check_steps(getattr(self, f.name), f.name)
        for name in ("adapter_rate", "b_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value} is not usable; use a multiple above 0, such as 3")

    @classmethod
    def settings(cls) -> frozenset[str]:
        """Names of the settings that the method has, ``preset`` aside."""
        without = {"preset", *(() if cls.trains in ("lora", "peft") else ("adapter_rate", "b_rate"))}
        return frozenset(f.name for f in fields(cls)) - without

    def rate_of(self, name: str) -> float:
        """The learning rate of a parameter, by its name, as a multiple of the run's."""
        if not is_adapter(name):
            return 1.0
        own = self.rate if self.preset == "recommended" else 1.0
        factors = [own if self.adapter_rate is None else self.adapter_rate]
        factors += [factor for key, factor in self.rates.items() if key in name]
        return math.prod(factors) * (self.b_rate if "lora_B" in name else 1.0)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Any:
        """The method with a preset's values; any field can be overridden. The same as ``cls(preset=preset, ...)``.

        Raises:
            ConfigError: unknown preset, or a field that the method does not have.
        """
        return cls(**{**overrides, "preset": preset})

    @property
    def label(self) -> str:
        """The preset, and which of its settings this method has otherwise: "paper, changed: score"."""
        values = self.presets.get(self.preset, {})
        changed = [
            f.name
            for f in fields(self)
            if f.name != "preset"
            and (f.name in values or f.name not in self.asked)
            and getattr(self, f.name) != values.get(f.name, f.default)
        ]
        return f"{self.preset}, changed: {', '.join(changed)}" if changed else self.preset

    @property
    def uses_adapters(self) -> bool:
        """Whether a policy drives plain LoRA adapters."""
        return self.trains == "lora"

    @property
    def has_adapters(self) -> bool:
        """Whether the model gets adapters, of ours or PEFT's."""
        return self.trains in ("lora", "peft")

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

    def within(self, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[Any, int]:
        """This method with its own knobs turned so that it trains at most `params` adapter parameters, and the rank to
        build the model with.

        Args:
            params: the budget.
            shapes: ``(d_in, d_out)`` of each target.
            rank: what the user asked for; a method that spends the budget on ranks replaces it.
            kinds: of each target, the last part of its name; for a method whose layers share by kind.

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
        """The method's name and settings as plain data."""
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
            preset=self.label,
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

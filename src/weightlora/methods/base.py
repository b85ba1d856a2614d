"""One interface for every method: a frozen config says what is wanted, and of which kind the method is."""

from __future__ import annotations

import math
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from torch import nn

from weightlora.core.budget import rank_for_params
from weightlora.errors import ConfigError
from weightlora.graft.adapters import Adapter, is_adapter
from weightlora.graft.selection import Selection, select
from weightlora.methods.checks import check_k_value, check_steps
from weightlora.methods.policy import Policy
from weightlora.settings import check, setting

if TYPE_CHECKING:
    from weightlora.graft.tuners import LoraConfig, PeftConfig

Preset = Literal["recommended", "paper", "official"]
PRESETS = get_args(Preset)
Shapes = Sequence[tuple[int, int]]  # (d_in, d_out) of each target
M = TypeVar("M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What survivors must stay within: of what, how much (bytes, or a share), and as the user wrote it.

    ``assumed``: nobody asked for it; where it cannot be counted, the method decides by a count.
    """

    kind: Literal["memory", "step_time", "kept"]
    amount: float
    said: str
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs of a run, or will do in it, said before the run begins.

    ``held_out``: batches of training rows to set aside for the method to look at. ``limit``: survivors must stay within
    it, and the policy takes a :class:`~weightlora.methods.policy.Budget`. ``k``: how many adapters survive, a count or
    a share of them, where that is a setting. ``grows``: survivors get more ranks at the seam, at most ``max_rank``.
    ``copies``: copies of all adapters that a step before the seam holds.
    """

    held_out: int = 0
    limit: Limit | None = None
    k: int | float | None = None
    grows: bool = False
    max_rank: int | None = None
    copies: int = 0


class _FromPreset(ABCMeta):
    """Fills what the caller leaves out from the preset that he names, before any default of the class."""

    def __call__(cls: type[M], *alone: object, **given: Any) -> M:  # type: ignore[misc]  # a metaclass's self is a class
        known = [*cls.settings(), "preset"]
        allowed = ", ".join(sorted(known, key=lambda name: (name == "preset", name)))
        if alone:
            raise ConfigError(f"{cls.name} takes settings by name, not {alone[0]!r} alone; they are {allowed}")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"{cls.name} has no setting {unknown[0]!r}; it has {allowed}")
        preset = given.get("preset", "recommended")
        values = cls.presets.get(preset, {}) if isinstance(preset, str) else {}
        made: M = type.__call__(cls, **{**values, **given})
        return made


@dataclass(frozen=True, kw_only=True)
class Method(ABC, metaclass=_FromPreset):
    """A method's settings. ``preset`` names where those come from that are not given.

    Every method is of one of three kinds: :class:`AdapterMethod`, :class:`TunerMethod`, :class:`PlainMethod`.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    learns: ClassVar[bool] = True  # whether anything trains
    chooses_k: ClassVar[bool] = False  # how many adapters survive is an outcome, and differs from run to run
    spending: ClassVar[str] = "ranks are whole numbers"  # why a budget of parameters may not be met
    in_shares: ClassVar[tuple[str, ...]] = ("select_after",)  # settings that may be shares of the run
    in_counts: ClassVar[tuple[str, ...]] = ()  # settings that are counts, or shares of what there is
    # What every run says for itself: no preset is changed by it, unless the preset has a value for it.
    asked: ClassVar[tuple[str, ...]] = ("k", "memory", "step_time", "kept", "share", "spend", "seed")

    preset: Preset = "recommended"

    def __post_init__(self) -> None:
        check(self)
        for f in fields(self):
            if f.name in self.in_shares:
                check_steps(getattr(self, f.name), f.name)
            if f.name in self.in_counts:
                check_k_value(getattr(self, f.name), f.name)

    @classmethod
    def settings(cls) -> frozenset[str]:
        """Names of the settings that the method has, ``preset`` aside."""
        return frozenset(f.name for f in fields(cls)) - {"preset"}

    @classmethod
    def from_preset(cls: type[M], preset: str, **overrides: Any) -> M:
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
    def needs(self) -> Needs:
        """What a run must have for this method."""
        return Needs()

    @property
    def shares(self) -> tuple[str, ...]:
        """Settings that are given as shares of the run."""
        given = (f.name for f in fields(self) if f.name in self.in_shares)
        return tuple(name for name in given if isinstance(getattr(self, name), float))

    def rate_of(self, name: str) -> float:
        """The learning rate of a parameter, by its name, as a multiple of the run's."""
        return 1.0

    @abstractmethod
    def within(self: M, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[M, int]:
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

    def to_dict(self) -> dict[str, object]:
        """The method's name and settings as plain data."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class PeftMethod(Method):
    """A method whose model gets PEFT adapters.

    ``adapter_rate``: the adapters' learning rate, as a multiple of the run's (which is the head's). None: the method's
    own, :attr:`rate`, under the preset `recommended`, otherwise 1. ``b_rate``: that of B, as a multiple of A's (LoRA+,
    Hayou et al. 2024).
    """

    rate: ClassVar[float] = 1.0  # the adapters' learning rate over the run's, under the preset `recommended`
    rates: ClassVar[Mapping[str, float]] = {}  # of some of them over the adapters', by a part of the parameter's name

    adapter_rate: float | None = setting(None, above=0, use="a multiple above 0, such as 3")
    b_rate: float = setting(1.0, above=0, use="a multiple above 0, such as 3")

    def rate_of(self, name: str) -> float:
        if not is_adapter(name):
            return 1.0
        own = self.rate if self.preset == "recommended" else 1.0
        factors = [own if self.adapter_rate is None else self.adapter_rate]
        factors += [factor for key, factor in self.rates.items() if key in name]
        return math.prod(factors) * (self.b_rate if "lora_B" in name else 1.0)

    @abstractmethod
    def peft_config(self, lora: LoraConfig, shapes: Shapes) -> PeftConfig:
        """The PEFT configuration to build the model with.

        Args:
            lora: the ``LoraConfig`` that plain LoRA would use.
            shapes: ``(d_in, d_out)`` of its targets.
        """


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(PeftMethod):
    """A method on plain LoRA adapters: its policy decides which of them live."""

    def peft_config(self, lora: LoraConfig, shapes: Shapes) -> PeftConfig:
        return lora

    def within(self: M, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[M, int]:
        return self, rank_for_params(params, shapes)

    @abstractmethod
    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        """Check that the method can run on these adapters in this many optimizer steps, and start it.

        Raises:
            ScheduleError: it cannot; the message says what would.
        """

    def keep_all(self, live: Sequence[Adapter], why: str) -> Selection:
        """The decision of a method under which every adapter lives."""
        return self.choose(live, range(len(live)), why, step=None)

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


@dataclass(frozen=True, kw_only=True)
class TunerMethod(PeftMethod):
    """A tuner of PEFT's own: nothing is decided while it trains, and its adapter keeps PEFT's own format."""

    kind: ClassVar[str]  # of the model's PEFT adapters

    @abstractmethod
    def rank(self, built: int) -> int:
        """The rank of its adapters, where the model was to be built with rank `built`."""


@dataclass(frozen=True, kw_only=True)
class PlainMethod(Method):
    """A method on the model as it is, without adapters: there is nothing to decide, and no budget to spend."""

    trains: ClassVar[str]  # what trains, in words

    def within(self: M, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[M, int]:
        return self, rank

    @abstractmethod
    def freeze(self, model: nn.Module, heads: Sequence[str] | None = None) -> None:
        """Let only that require gradients which the method trains.

        Args:
            model: whose parameters all require gradients.
            heads: names of the modules on top of the base; None: those that can be found.
        """

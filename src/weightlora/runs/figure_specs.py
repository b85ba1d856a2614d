"""What the commands that make the paper's figures may be told beside a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from weightlora.errors import ConfigError
from weightlora.runs.spec import RunSpec
from weightlora.settings import check, setting, typed

T = TypeVar("T", bound="_FigureSpec")


@dataclass(frozen=True, kw_only=True)
class _FigureSpec:
    run: RunSpec

    @classmethod
    def of(cls: type[T], settings: Mapping[str, object]) -> T:
        """Make it from settings of its own and of the run, text read as on a command line."""
        names = {each.name for each in fields(cls)} - {"run"}
        own = {name: value for name, value in settings.items() if name in names}
        run = RunSpec.of({name: value for name, value in settings.items() if name not in names})
        return cls(run=run, **typed(cls, own))


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(_FigureSpec):
    """Say what is probed for Figure 2.

    Args:
        run: task, model, adapters, and the WeightLoRA run whose selection is starred. Its seed is not used.
        mode: "cheap": all adapters train in one run, that of WeightLoRA itself, and the products are read at its step
            T. "paper": the same T steps with one adapter connected at a time, for each of the n.
        seeds: one measurement each.
        gradient_rows: training rows (the same for all) over which the gradient of the mean loss is taken.

    Raises:
        ConfigError: a value that is not allowed.
    """

    mode: str = setting(
        "cheap",
        "cheap (default): all adapters in one run; paper: one adapter at a time, n runs of T steps for each seed",
        choices=("cheap", "paper"),
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds, comma-separated (default: 0,1,2)", metavar="S,S,...")
    gradient_rows: int = setting(
        512, "training rows that the gradient is taken over (default: 512)", metavar="N", least=1
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={','.join(map(str, self.seeds))} must be different numbers, such as 0,1,2")
        if self.run.method.name not in ("weightlora", "weightlora+"):
            raise ConfigError(
                f"a probe marks what weightlora selects, so it takes no method {self.run.method.name!r}; use weightlora"
            )


@dataclass(frozen=True, kw_only=True)
class CurveSpec(_FigureSpec):
    """Say what is counted for Figure 3.

    Args:
        run: task, model, adapters and micro-batch. The seed draws the random order of connecting.
        ranks: one pair of curves each.
        points: about so many numbers of connected adapters, from 0 to all n.
        limit: the device's memory, a line in the picture; None: no line.

    Raises:
        ConfigError: a value that is not allowed.
    """

    ranks: tuple[int, ...] = setting(
        (1, 8, 64), "comma-separated, a pair of curves each (default: 1,8,64)", metavar="R,R,..."
    )
    points: int = setting(10, "numbers of adapters from none to all (default: 10)", metavar="N", least=2)
    limit: str | None = setting(None, "the device's memory, such as 16GiB: a line in the picture", metavar="SIZE")

    def __post_init__(self) -> None:
        from weightlora.core.sizes import parse_bytes

        check(self)
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ConfigError(f"ranks={','.join(map(str, self.ranks))} must be different ranks of 1 or more, as 1,8,64")
        if self.limit is not None:
            parse_bytes(self.limit)

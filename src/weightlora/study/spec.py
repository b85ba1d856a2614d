"""What a command line or a recipe may say about a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from weightlora.settings import setting

Listed: TypeAlias = str | int | float | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """Say what is repeated and what is tuned; the lists of a command line or a recipe.

    Raises:
        ConfigError: a value that is not allowed.
    """

    tasks: Listed = setting(None, "tasks (default: the one of --task)", metavar="T,T,...")
    methods: Listed = setting(None, "each NAME or NAME:PRESET; or all", metavar="M,M,...")
    ranks: Listed = setting(None, "ranks, each with rows of its own (default: the one of --r)", metavar="R,R,...")
    learning_rates: Listed = setting(None, "learning rates to choose from, for each task and method", metavar="X,X,...")
    tune: Listed = setting(
        None,
        "choose each method's learning rate from these multiples of its default (such as 0.3,1,3)",
        metavar="X,X,...",
    )
    lr_warmups: Listed = setting(
        None, "warm-ups of the learning rate to choose from, steps or shares", metavar="N,N,..."
    )
    seeds: Listed = setting("0,1,2", "of the reported runs (default: 0,1,2)", metavar="S,S,...")
    selection_seeds: Listed = setting(
        None, "of the runs that choose (default: the first of --seeds)", metavar="S,S,..."
    )
    metric: str | None = setting(
        None,
        "compare and choose by the loss on the validation rows (lower is better); default: the task's metric",
        choices=("eval_loss",),
    )

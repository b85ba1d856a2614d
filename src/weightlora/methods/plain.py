"""Training without adapters: every weight, the head alone, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from weightlora.graft.adapters import train_heads
from weightlora.methods.base import PlainMethod


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(PlainMethod):
    """Train every weight, without adapters: the upper reference of a table."""

    name: ClassVar[str] = "full"
    trains: ClassVar[str] = "every weight trains"

    def freeze(self, model: nn.Module, heads: Sequence[str] | None = None) -> None:
        """Leave the model as it is."""


@dataclass(frozen=True, kw_only=True)
class HeadOnly(PlainMethod):
    """Train only the head, on the features of the frozen base. Adapters should be better than this."""

    name: ClassVar[str] = "head"
    trains: ClassVar[str] = "no adapters: the head alone trains"

    def freeze(self, model: nn.Module, heads: Sequence[str] | None = None) -> None:
        train_heads(model, heads)


@dataclass(frozen=True, kw_only=True)
class ZeroShot(PlainMethod):
    """Train nothing: evaluate the model as it is, on tasks that it answers in words. A control of ours."""

    name: ClassVar[str] = "zero-shot"
    learns: ClassVar[bool] = False
    trains: ClassVar[str] = "nothing trains: the model is judged as it is"

    def freeze(self, model: nn.Module, heads: Sequence[str] | None = None) -> None:
        """Leave the model as it is: nobody trains it."""

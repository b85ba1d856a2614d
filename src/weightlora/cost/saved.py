"""What autograd holds in the place of tensors that it saved, and how it is made to let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch import Tensor


class Saved:
    """One saved tensor; alive as long as backward may ask for it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


S = TypeVar("S", bound=Saved)


class Held(Generic[S]):
    """Everything that a graph holds through hooks of ours.

    >>> import torch
    >>> held: Held[Saved] = Held()
    >>> with torch.autograd.graph.saved_tensors_hooks(lambda t: held.add(Saved(t)), lambda saved: saved.tensor):
    ...     y = torch.ones(2, requires_grad=True).tanh()
    >>> len(list(held)); held.let_go()
    1
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[S] = weakref.WeakSet()

    def add(self, saved: S) -> S:
        """Note what is about to be held."""
        self._alive.add(saved)
        return saved

    def __iter__(self) -> Iterator[S]:
        return iter(list(self._alive))

    def let_go(self, leave: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        """Cut what is held off the graph that made it: a node that saved its own output holds itself, and what the
        hooks know, in a circle through C++ that no collector sees.

        ``leave``: what stays in the place of a tensor; by default whoever still goes back through the graph finds it
        all.
        """
        for saved in self:
            saved.tensor = leave(saved.tensor)

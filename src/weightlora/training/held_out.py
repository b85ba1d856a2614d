"""Training rows that a method may look at because the run does not train on them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from weightlora.cost.measure import isolated_rng
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapter_name, parameters
from weightlora.graft.directions import input_directions
from weightlora.training.inside import Inside, model_of
from weightlora.training.undisturbed import given_back

Seen = TypeVar("Seen")
SHARE = 0.2  # of the training rows, at most


class HeldOutBatches:
    """Batches under a model; see :class:`weightlora.methods.HeldOut`.

    Args:
        model: as it trains.
        batches: what a forward pass takes.
        compute: the mean loss of a batch; default: ``model(**batch).loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, object]],
        compute: Callable[[Mapping[str, Any]], Tensor] | None = None,
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.compute = compute or (lambda batch: model(**batch).loss)

    def __len__(self) -> int:
        return len(self.batches)

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        with isolated_rng():
            self.model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def loss(self, index: int) -> Tensor:
        with self._unseen():
            return self.compute(self.batches[index])

    def watch(
        self, index: int, look: Callable[[nn.Module], AbstractContextManager[Seen]], *, backward: bool = False
    ) -> Seen:
        with self._unseen(), torch.set_grad_enabled(backward), look(self.model) as seen:
            loss = self.compute(self.batches[index])
            if backward:
                pairs = parameters(self.model, adapter_name(self.model)).values()
                torch.autograd.grad(loss, [B for _, B in pairs], allow_unused=True)  # .grad stays as it is
        return seen

    def directions(self, rho: float) -> Sequence[Tensor]:
        with self._unseen():
            return input_directions(self.model, self.batches, self.compute, rho)


def rows_to_hold_out(rows: int, batches: int, batch_size: int) -> int:
    """How many of `rows` training rows `batches` batches take: never more than a fifth.

    >>> rows_to_hold_out(1000, 4, 32), rows_to_hold_out(100, 4, 32), rows_to_hold_out(1000, 0, 32)
    (128, 20, 0)
    """
    return min(batches * batch_size, int(SHARE * rows)) if batches else 0


def hold_out(trainer: Trainer, batches: int) -> HeldOutBatches | None:
    """Take rows out of the trainer's training set, the same for the same seed and set, and make batches of them.

    Where labels are classes every class gives its share of the rows, to within one row.
    Every process of a parallel run gets the same batches, whole: what is decided from them is decided alike everywhere.

    Raises:
        ConfigError: the set has no length, or too few rows.
    """
    if not batches:
        return None
    data: Any = trainer.train_dataset
    try:
        count = len(data)
    except TypeError:
        raise ConfigError(
            "the method holds out training rows, which needs a train_dataset with a length; give one"
        ) from None
    held = rows_to_hold_out(count, batches, trainer.args.per_device_eval_batch_size)
    if held < 1:
        raise ConfigError(f"{count} training rows are too few to hold some out; use 5 or more")
    generator = torch.Generator().manual_seed(trainer.args.seed)
    order = torch.randperm(count, generator=generator).tolist()
    taken = stratified(order, _classes(data, count), held)
    parts = [_rows(data, part) for part in (sorted(taken), sorted(set(order) - set(taken)))]
    trainer.train_dataset = parts[1]
    model, inside = model_of(trainer), Inside(trainer)

    def compute(batch: Mapping[str, object]) -> Tensor:
        with given_back(trainer), trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inside.prepared(dict(batch)))  # type: ignore[return-value]

    # Not the trainer's evaluation loader, which hands each process a share.
    loader = DataLoader(
        parts[0],
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=inside.collator(),
    )
    return HeldOutBatches(model, list(loader), compute)


def stratified(order: Sequence[int], classes: Sequence[int], held: int) -> list[int]:
    """`held` of the rows in `order`, evenly spaced once they lie class by class: a class of c rows gives c held / n.

    >>> stratified([3, 0, 2, 1], [0, 1, 0, 1], 2)
    [2, 1]
    """
    lined = sorted(order, key=classes.__getitem__)  # stable: within a class the order stays random
    return [lined[(2 * i + 1) * len(lined) // (2 * held)] for i in range(held)]


def _classes(data: Any, count: int) -> list[int]:
    """The class of every row; one class for all where labels are numbers, tokens or not there."""
    key = next((name for name in ("labels", "label") if name in data[0]), None)
    if key is None:
        return [0] * count
    column = (data[i][key] for i in range(count)) if getattr(data, "select", None) is None else data[key]
    try:
        return [operator.index(label) for label in column]
    except TypeError:
        return [0] * count


def _rows(data: Any, indices: list[int]) -> Any:
    """Some rows; a ``datasets.Dataset`` stays one, as the trainer likes to have it."""
    select = getattr(data, "select", None)
    return Subset(data, indices) if select is None else select(indices)

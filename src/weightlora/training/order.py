"""Which rows come next: over the seam the epoch that has begun goes on, batch by batch, as if nothing had been.

The trainer leaves its loop at T and enters it anew. By itself it would make a new loader and skip what was seen, and
find the place again only where an epoch's order follows from the seed. So loader and iterator are kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import has_length

from weightlora.training.inside import Inside, instead
from weightlora.training.trainer import initial_values

log = logging.getLogger("weightlora")


class DataOrder:
    """The training loader of one run, over all calls of the trainer's ``train`` in this process."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._loader: DataLoader | None = None
        self._live: Iterator[object] = iter(())  # the epoch that has begun
        self._read = 0  # of its batches
        self._skipped = 0  # of the epoch that a resumed run goes on in
        self._split: tuple[int, int] | None = None

    @contextlib.contextmanager
    def over(self, start: Path | None, step: int) -> Iterator[None]:
        """Put around a call of ``train``: it goes on where the last one stopped, or from a checkpoint.

        ``ignore_data_skip`` is about checkpoints of earlier processes: no row comes twice because of the seam.

        Args:
            start: the checkpoint that the trainer will load.
            step: of that checkpoint.
        """
        trainer, args = self.trainer, self.trainer.args
        split = args.per_device_train_batch_size, args.gradient_accumulation_steps
        kept = self._loader if split == self._split else None
        again, left = self._loader is not None, 0
        if self._loader is not None and kept is None and self._split is not None and has_length(self._loader):
            left = (len(self._loader) - self._read) * self._split[0]  # rows that the smaller or larger batches share
        self._split = split
        make = trainer.get_train_dataloader
        samples: Callable[..., tuple[list[object], object]] = trainer.get_batch_samples
        calls = 0

        def get_train_dataloader() -> DataLoader | None:
            nonlocal calls
            calls += 1
            if calls > 1:  # somebody else's
                return make()
            if kept is None:
                self._loader = make()
                if start is not None and not args.ignore_data_skip:
                    self._skipped = _batches_into_epoch(trainer, self._loader, step)
                    warn_of_a_new_order(trainer, self._loader, step, left)
            return self._loader

        def get_batch_samples(epoch_iterator: Iterator[object], *given: object, **named: object) -> object:
            if epoch_iterator is not self._live:
                self._live, self._read, self._skipped = epoch_iterator, self._skipped, 0
            found = samples(epoch_iterator, *given, **named)
            self._read += len(found[0])
            return found

        with contextlib.ExitStack() as stack:
            if again:
                stack.enter_context(instead(args, ignore_data_skip=False))
            if kept is not None and start is not None and _batches_into_epoch(trainer, kept, step):
                self._go_on(stack, kept, start, step)
            own = {"get_train_dataloader": get_train_dataloader, "get_batch_samples": get_batch_samples}
            stack.enter_context(instead(trainer, **own))
            yield

    def _go_on(self, stack: contextlib.ExitStack, loader: DataLoader, start: Path, step: int) -> None:
        """Give the trainer, where it skips what was seen of the epoch, the rest of its iterator."""
        trainer = self.trainer
        skip = transformers_trainer.skip_first_batches
        left_out = _batches_into_epoch(trainer, loader, step) - self._read
        if left_out and has_length(loader):
            log.warning(
                "resumed with ignore_data_skip, this epoch began anew; it ends where it would have: %d of its rows are"
                " left out",
                left_out * trainer.args.per_device_train_batch_size,
            )
        # As without a seam: random numbers go on from the last step, through reading, to the next step. The trainer
        # would put them back once more after reading.
        load_random_state = stack.enter_context(Inside(trainer).keeping_random_state())
        rest = _Rest(self._live, lambda: load_random_state(start))
        stack.enter_context(
            instead(
                transformers_trainer,
                skip_first_batches=lambda given, count: rest if given is loader else skip(given, count),
            )
        )


class _Rest:
    """What is left of an iterator; `begin` is called before the first of it is read."""

    def __init__(self, live: Iterator[object], begin: Callable[[], None]) -> None:
        self.live, self.begin = live, begin

    def __iter__(self) -> Iterator[object]:
        self.begin()
        yield from self.live


def _batches_into_epoch(trainer: Trainer, loader: DataLoader, step: int) -> int:
    """How many batches of its epoch the trainer takes for read after `step` optimizer steps."""
    return step % initial_values(trainer, loader)[1] * trainer.args.gradient_accumulation_steps


def warn_of_a_new_order(trainer: Trainer, loader: DataLoader, step: int, left: int = 0) -> None:
    """Say it where the trainer goes on within an epoch, and cannot find the order that it had begun in.

    No checkpoint of the trainer's holds what a sampler has drawn; an order that follows from seed and epoch is found.

    Args:
        left: rows of the epoch that has begun, where this process knows; 0: as the trainer counts.
    """
    if isinstance(loader.dataset, IterableDataset):
        return
    if not left and (read := _batches_into_epoch(trainer, loader, step)):
        left = (len(loader) - read) * trainer.args.per_device_train_batch_size
    if not left:
        return
    batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
    sampler = getattr(batches, "sampler", None)
    by_epoch = any(getattr(part, "set_epoch", None) is not None for part in (batches, sampler))
    if by_epoch or isinstance(sampler, SequentialSampler):
        return
    log.warning(
        "%s draws the epoch's order anew at step %d, as whenever the trainer resumes: of the %d rows that are left,"
        " some come twice, and others not; a checkpoint at the end of an epoch avoids it",
        type(batches if sampler is None else sampler).__name__,
        step,
        left,
    )

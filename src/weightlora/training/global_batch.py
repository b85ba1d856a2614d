"""What an optimizer step is made of, so that a run goes on as it began under another number of processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import Trainer

from weightlora.decoding import decode_part
from weightlora.errors import CheckpointError
from weightlora.training.trainer import average_micro_batches, use_batch

log = logging.getLogger("weightlora")


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """Examples of one optimizer step over all processes, and how their gradients add up.

    ``parts`` is how many micro-batches' losses the trainer adds up where the model ignores their number; ``averaged``
    says that they are averaged instead, as under several processes and wherever the micro-batch is not the trainer's.
    """

    processes: int
    examples: int
    parts: int
    averaged: bool

    @classmethod
    def of(cls, trainer: Trainer, averaged: bool) -> GlobalBatch:
        """As the trainer's arguments are now."""
        args = trainer.args
        accumulation, together = args.gradient_accumulation_steps, int(args.world_size)
        return cls(
            processes=together,
            examples=args.per_device_train_batch_size * accumulation * together,
            parts=accumulation * (together if args.average_tokens_across_devices else 1),
            averaged=averaged,
        )

    @classmethod
    def read(cls, data: Mapping[str, object], where: Path) -> GlobalBatch:
        """What a manifest's data say.

        Raises:
            CheckpointError: they are damaged.
        """
        found: GlobalBatch = decode_part(cls, data, "batch", where)
        for number in (found.processes, found.examples, found.parts):
            if not 0 < number < 2**31:
                raise CheckpointError(f"{where}: the manifest is damaged: {number!r} is no size of a batch")
        return found

    def to_dict(self) -> dict[str, object]:
        """For the manifest."""
        return asdict(self)

    def keep(self, trainer: Trainer, where: Path) -> None:
        """Let the trainer's steps have as many examples as this run began with.

        Under another number of processes accumulation follows, and the micro-batch where it must get smaller.

        Raises:
            CheckpointError: they cannot have as many, or the arguments ask for another batch.
        """
        args, now = trainer.args, GlobalBatch.of(trainer, self.averaged)
        each, rest = divmod(self.examples, now.processes)
        if now.examples != self.examples:
            if now.processes == self.processes or rest:
                raise CheckpointError(
                    f"{where} was made with {self.examples} examples in a step, over {self.processes} processes; this"
                    f" run has {now.examples}, over {now.processes}; resume with as many examples in a step, on a"
                    " number of processes that divides them"
                )
            micro = max(size for size in range(1, args.per_device_train_batch_size + 1) if each % size == 0)
            use_batch(trainer, (micro, each // micro))
        if now.processes != self.processes:
            log.warning(
                "%s was made by %d processes and goes on with %d, %d x %d examples in a step on each: batches and their"
                " order stay, random numbers (dropout) are others from here on, and so is what fills up an epoch's last"
                " batch",
                where,
                self.processes,
                now.processes,
                args.per_device_train_batch_size,
                args.gradient_accumulation_steps,
            )

    def add_up(self, trainer: Trainer, split: bool, where: Path) -> bool:
        """Let gradients add up as this run began; whether they are averaged.

        Args:
            split: the micro-batch is not the trainer's own.

        Raises:
            CheckpointError: it began with a sum over another number of micro-batches.
        """
        now = GlobalBatch.of(trainer, self.averaged)
        if self.averaged or self.parts == 1:
            return (split or now.parts > 1) and averages(trainer)
        if now.parts == self.parts and not split:
            return False
        if averages(trainer):
            raise CheckpointError(
                f"{where} was trained with gradients summed over {self.parts} micro-batches (the model ignores"
                " how many there"
                f" are, and the trainer adds them up); here a step has {now.parts}: resume with processes x"
                f" accumulation = {self.parts} and no micro_batch, so that gradients stay as large as they were"
            )
        return False


def averages(trainer: Trainer) -> bool:
    """Average micro-batches and processes from here on; whether that made a difference."""
    before = trainer.model_accepts_loss_kwargs
    average_micro_batches(trainer)
    return bool(before and not trainer.model_accepts_loss_kwargs)

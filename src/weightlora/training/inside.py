"""What a Transformers trainer keeps to itself: every private thing of it that this package calls, reads or sets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer


@contextlib.contextmanager
def instead(thing: object, **values: object) -> Iterator[None]:
    """Let attributes be others; those that the object itself did not have are taken away again."""
    own = {name: vars(thing)[name] for name in values if name in vars(thing)}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(thing, name)
        vars(thing).update(own)


def model_of(trainer: Trainer) -> PreTrainedModel:
    """The trainer's model, typed as what it is or wraps: PEFT's wrapper hands calls on."""
    return cast(PreTrainedModel, trainer.model)


class Inside:
    """A trainer's private side, by names that say what it is for.

    Args:
        trainer: any version that ``pyproject.toml`` allows; what another version does otherwise is mended here.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._own = trainer

    def prepared(self, batch: object) -> dict[str, Tensor]:
        """A collated batch as the loss takes it: on the device, in the right dtype."""
        return dict(self._own._prepare_inputs(batch))  # type: ignore[arg-type]

    def collator(self, collator: Callable[[list[object]], object] | None = None) -> Callable[[list[object]], object]:
        """A collator, the trainer's own by default, that leaves columns out which the model does not take."""
        made: Callable[[list[object]], object] = self._own._get_collator_with_removed_columns(
            self._own.data_collator if collator is None else collator
        )
        return made

    @property
    def batch_size(self) -> int:
        """Examples in a micro-batch over the devices of this process."""
        return int(self._own._train_batch_size)

    def follow_batch_size(self) -> None:
        """Take the batch size from the arguments anew."""
        self._own._train_batch_size = self._own.args.train_batch_size

    def losses(self) -> tuple[float, Tensor, int]:
        """The sum of all steps' losses up to the last that was logged, the sum since then (a copy), and that step."""
        own = self._own
        return own._total_loss_scalar, own._tr_loss.detach().clone(), own._globalstep_last_logged

    def begin_with(self, total: float, since: float, logged: int) -> None:
        """Put :meth:`losses` back, and let the run that goes on have begun at step 0."""
        own = self._own
        own._tr_loss = torch.full_like(own._tr_loss, since)
        own._total_loss_scalar, own._globalstep_last_logged = total, logged
        own._initial_global_step = own._initial_num_input_tokens_seen = 0

    def load_checkpoint(self, folder: Path) -> None:
        """Load a checkpoint's weights alone."""
        self._own._load_from_checkpoint(str(folder))

    def load_best(self) -> None:
        """Load the weights of the best checkpoint that the state knows of."""
        self._own._load_best_model()

    @contextlib.contextmanager
    def keeping_random_state(self) -> Iterator[Callable[[Path], None]]:
        """While it lasts, ``train`` loads no random state; what is handed out does, from a checkpoint."""
        load = self._own._load_rng_state
        with instead(self._own, _load_rng_state=lambda checkpoint: None):
            yield lambda folder: load(str(folder))

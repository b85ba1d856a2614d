"""What ``fit`` changes of a trainer and its model while it runs, and gives back however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

from transformers import Trainer

from weightlora.graft.depth import BackwardDepth
from weightlora.training.inside import model_of

# Of the trainer itself: rows may be set aside, a micro-batch be split, micro-batches be averaged.
OWN = ("train_dataset", "_train_batch_size", "model_accepts_loss_kwargs")


@contextlib.contextmanager
def borrowed(trainer: Trainer) -> Iterator[None]:
    """Give back, when the block ends or an error leaves it, what was the user's.

    - the trainer's training rows and all its arguments;
    - of the model: training or evaluation mode of every module, gradient checkpointing, and the hooks that let inputs
      require gradients.

    What a run is about stays: the model's structure, ``trainer.state``, optimizer and scheduler are the run's, as after
    ``trainer.train()``. Bases of bitsandbytes are not packed for inference on a CPU any more, which would cost them
    their gradients; a base that FSDP has sharded stays sharded.
    """
    model = model_of(trainer)
    own = {name: getattr(trainer, name) for name in OWN}
    arguments = {field.name: getattr(trainer.args, field.name) for field in fields(trainer.args)}
    modes = [(module, module.training) for module in model.modules()]
    depth = BackwardDepth(model)
    try:
        yield
    finally:
        depth.restore()
        for module, training in modes:
            module.training = training
        for name, value in own.items():
            setattr(trainer, name, value)
        for name, value in arguments.items():
            if getattr(trainer.args, name) is not value:
                setattr(trainer.args, name, value)

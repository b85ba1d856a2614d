"""The optimizer of a run: its rates, and where it is resumed the checkpoint's order, so that states load by place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from transformers import PreTrainedModel, Trainer

from weightlora.errors import CheckpointError
from weightlora.graft.optimizer import arrange, group_names
from weightlora.methods import Method
from weightlora.training.inside import model_of
from weightlora.training.preflight import torch_optimizer


def trainers_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """The optimizer itself, without Accelerate's wrapper; None where there is none yet."""
    return None if trainer.optimizer is None else torch_optimizer(trainer.optimizer)


def load_optimizer(trainer: Trainer, start: Path) -> None:
    """The optimizer's state of the checkpoint, as the trainer loads it when it goes on training."""
    made_optimizer(trainer).load_state_dict(torch.load(start / "optimizer.pt", map_location="cpu", weights_only=True))


def set_rates(trainer: Trainer, method: Method) -> None:
    """Give the trainer an optimizer with the method's learning rates, groups in the order of the trainer's own.

    An optimizer that is there already keeps its groups: it is the user's, or has these.
    """
    model = model_of(trainer)
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    if trainer.optimizer is not None or all(method.rate_of(name) == 1.0 for name in names.values()):
        return
    optimizer = trainer.create_optimizer()
    for group in list(optimizer.param_groups):
        shares: dict[float, list[object]] = {}
        for parameter in group["params"]:
            shares.setdefault(method.rate_of(names[parameter]), []).append(parameter)
        rest = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
        group["params"] = shares.pop(1.0, [])
        for factor, own in shares.items():
            optimizer.add_param_group({**rest, "params": own, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def made_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer, made now where the trainer has yet to make it."""
    trainer.create_optimizer()
    return torch_optimizer(trainer.optimizer)


class OptimizerOrder:
    """Which parameters, by name, each group of a checkpoint's optimizer holds: states are loaded by place.

    Args:
        trainer: of the resumed run.
        data: of the checkpoint's manifest.
        start: the checkpoint.

    Raises:
        CheckpointError: what it says is damaged.
    """

    def __init__(self, trainer: Trainer, data: Mapping[str, object], start: Path) -> None:
        self.trainer = trainer
        found = data.get("optimizer")
        if not _are_groups(found):
            raise CheckpointError(f"{start}: the manifest is damaged: {found!r:.80} are no optimizer's groups")
        self.groups = found

    def count(self, method: Method) -> None:
        """Note the groups as they are before the model gets the checkpoint's structure, as those of the run were."""
        set_rates(self.trainer, method)
        self._before = group_names(made_optimizer(self.trainer), self._model)

    def follow(self) -> None:
        """Bring the optimizer into the checkpoint's order, now that the model has its structure."""
        arrange(made_optimizer(self.trainer), self._before, self.groups, self._model)

    @property
    def _model(self) -> PreTrainedModel:
        return model_of(self.trainer)


def _are_groups(found: object) -> TypeGuard[list[list[str]]]:
    return isinstance(found, list) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in found
    )

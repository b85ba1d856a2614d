"""What is looked at before the first step, because it cannot be known or mended after it."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import Trainer

from weightlora.errors import AdapterError, CheckpointError
from weightlora.graft.adapters import layer_weights, parameters
from weightlora.graft.carried import check_before, uncheckpointed
from weightlora.graft.start import moved_by, note_start
from weightlora.methods import Method, Policy
from weightlora.training.inside import model_of

log = logging.getLogger("weightlora")


def look_before(model: nn.Module, name: str, method: Method, policy: Policy) -> None:
    """Note what the model is now, and say what its checkpoints and exports will not hold.

    Raises:
        AdapterError: the initialisation moved the base and the method begins elsewhere, or it cannot be given back; or
            the method does what cannot be done to adapters on bare parameters.
    """
    _check_experts(method, policy)
    init = moved_by(model, name)
    if init is not None and _begins_elsewhere(model, name, policy):
        raise AdapterError(
            f"init_lora_weights={init!r} moved a part of the base into the adapters, and {method.name} gives them"
            " new values, so that part would be lost; use init_lora_weights=True"
        )
    lines = check_before(model, name)
    note_start(model, name)
    for line in lines:
        log.warning(line)


def _check_experts(method: Method, policy: Policy) -> None:
    """Refuse more than training and removing where PEFT adds adapters to whole weights: no gate fits in, and A and B
    stack the pairs of several matrices."""
    bare = next((a.name for a in policy.adapters if a.experts is not None), None)
    if bare is None:
        return
    setup, needs = policy.setup, method.needs
    does = [
        ("gates adapters", setup.gates != "none"),
        ("makes what computes of A and B in a form of its own", setup.form is not None),
        ("grows survivors", needs.grows),
        ("gives adapters ranks or values of its own", bool(setup.ranks or setup.ties or setup.start)),
        ("looks at the layers' inputs", needs.held_out > 0 or policy.watches),
        ("reads the layers' weights", setup.check is not None),
    ]
    what = next((words for words, found in does if found), None)
    if what is not None:
        raise AdapterError(
            f"{method.name} {what}, which cannot be done to {bare}, a bare parameter (experts, a router): PEFT adds its"
            " adapter to the whole weight. Use weightlora with score='credit', gradient, random, top or lora, or target"
            " linear layers alone"
        )


def check_checkpoints(trainer: Trainer, name: str, *, resumed: bool) -> None:
    """Refuse to load a checkpoint, now or at the end as the best, that does not hold all that trains.

    Raises:
        CheckpointError: weights of the base train, or running statistics change, which PEFT does not save.
    """
    model = model_of(trainer)
    missing = uncheckpointed(model, name)
    if missing and (resumed or trainer.args.load_best_model_at_end):
        raise CheckpointError(
            f"no checkpoint holds {missing[0]}, which trains outside the adapters, so that none can be resumed or"
            " loaded as the best; name its module in modules_to_save, or start afresh without"
            " load_best_model_at_end"
        )


def _begins_elsewhere(model: nn.Module, name: str, policy: Policy) -> bool:
    """Whether the policy changes what the adapters compute, before training or at the seam. Asked on copies."""
    setup = policy.setup
    if setup.ranks or setup.ties or setup.form is not None or setup.restarts:
        return True
    if setup.start is None:
        return False
    live = [factor for pair in parameters(model, name).values() for factor in pair]
    copies = [factor.detach().clone() for factor in live]
    setup.start(list(zip(copies[::2], copies[1::2], strict=True)), layer_weights(model, name), None)
    return not all(map(torch.equal, live, copies))

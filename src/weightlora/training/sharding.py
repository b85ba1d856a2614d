"""FSDP2: the frozen base is sharded over the processes, what trains is not.

Adapters and heads are small. They stay whole on every process and are averaged by DDP, as without FSDP; so gates,
surgery, growth, checkpoints, and a resume under another number of processes are those of plain data parallelism. The
base never changes and is never saved; ``torch.distributed.fsdp.fully_shard`` keeps a part of it on each process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from weightlora.errors import ConfigError
from weightlora.graft.adapters import is_sharded
from weightlora.methods import Method, Policy
from weightlora.training.inside import model_of
from weightlora.training.processes import processes

log = logging.getLogger("weightlora")


def asked_for(trainer: Trainer) -> FullyShardedDataParallelPlugin | None:
    """The FSDP settings that the user gave the trainer or the launcher; None: no FSDP.

    On CPUs Accelerate would pass over them in silence, and replicate the base.
    """
    if trainer.is_fsdp_enabled:
        found: FullyShardedDataParallelPlugin = trainer.accelerator.state.fsdp_plugin
        return found
    if trainer.args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    return FullyShardedDataParallelPlugin() if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def check_sharding(trainer: Trainer) -> None:
    """Refuse, with the remedy, what shards in a way that gates and surgery cannot work on.

    Raises:
        ConfigError: FSDP1, an offloaded or not fully loaded base, or a model that is sharded already.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    model, given = model_of(trainer), trainer.args.fsdp_plugin_args
    if is_sharded(model):
        raise ConfigError(
            "the model's weights are sharded already (fully_shard, or a distributed_config of from_pretrained); give"
            " the trainer a whole model and fsdp=True, and fit shards its base"
        )
    # Looked at first: on CPUs FSDP1's plugin cannot even be made.
    version = None if given is None else int(given["fsdp_version"])
    plugin = None if version == 1 else asked_for(trainer)
    if plugin is not None:
        version = int(plugin.fsdp_version)
    if version == 1:
        raise ConfigError(
            "FSDP1 puts adapters and base into one flat parameter, from which none can be removed; use FSDP2:"
            " fsdp_config={'version': 2}, or fsdp_version: 2 for accelerate launch"
        )
    if plugin is None:
        return
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "FSDP's cpu_ram_efficient_loading leaves most processes without weights, and fit looks at them first; set"
            " cpu_ram_efficient_loading (fsdp_cpu_ram_efficient_loading for accelerate launch) to false"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("FSDP's cpu_offload is not supported; set cpu_offload (fsdp_offload_params) to false")
    if plugin.activation_checkpointing:
        raise ConfigError("FSDP's activation_checkpointing is not supported; use gradient_checkpointing=True instead")


@contextlib.contextmanager
def as_data_parallel(trainer: Trainer, *, sharded: bool) -> Iterator[None]:
    """Inside, the trainer and Accelerate see data parallelism only: saving, loading and clipping are DDP's."""
    if not (sharded and trainer.is_fsdp_enabled):
        yield
        return
    state = trainer.accelerator.state
    trainer.is_fsdp_enabled = False
    state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = True
        state.distributed_type = DistributedType.FSDP


def check_method(method: Method, policy: Policy, init: str | None = None) -> None:
    """Refuse what reads or changes the base's weights, or counts a whole model's cost.

    Raises:
        ConfigError: the method, or `init`, an initialisation that moved the base, is one of them.
    """
    if init is not None:
        raise ConfigError(
            f"init_lora_weights={init!r} moved a part of the base's weights into the adapters, which cannot be"
            " added back under FSDP; run"
            " without FSDP, or use init_lora_weights=True"
        )
    if any(adapter.experts is not None for adapter in policy.adapters):
        raise ConfigError(
            "PEFT adds the adapters of bare parameters (experts, routers) to whole weights, which FSDP shards; run"
            " without FSDP, or target linear layers alone"
        )
    if policy.setup.check is not None:
        raise ConfigError(f"{method.name} reads the base's weights, which FSDP shards; run it without FSDP")
    limit = method.needs.limit
    if limit is not None and not limit.assumed:
        raise ConfigError(f"{limit.kind} is counted on a whole base, which FSDP shards; use k, or no FSDP")


def shard_base(trainer: Trainer) -> None:
    """Shard all that is frozen, block by block; what trains goes to the device whole.

    The model's blocks are the classes that FSDP was told (``transformer_layer_cls_to_wrap``), or that Transformers
    never splits. Weights that are no floating point numbers (quantised ones) stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin, model = asked_for(trainer), cast(Any, trainer.model)
    assert plugin is not None
    names = set(plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ())
    whole = {p for p in model.parameters() if p.requires_grad or not p.is_floating_point()}
    device = trainer.args.device
    shard = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (processes(),)),
        ignored_params=whole,
        # Always, so that between passes all processes hold the same: a state dict, which one alone may take, reshards.
        reshard_after_forward=True,
    )
    embedding = model.get_input_embeddings()
    # Children first; embeddings may be tied to an output layer, and stay with the rest.
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names and all(part is not embedding for part in module.modules()):
            shard(module)
    shard(model)
    model.to(device)
    here = sum(p.to_local().numel() for p in model.parameters() if is_sharded(p))
    log.info("FSDP2: %d numbers of the frozen base on this process; what trains is whole on each", here)


def leave_to_fsdp(model: nn.Module) -> None:
    """Tell DDP, which would refuse them, to keep off the sharded parameters; names change at the seam."""
    names = [name for name, p in model.named_parameters() if is_sharded(p)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def to_device(trainer: Trainer) -> None:
    """Move what trains; a trainer leaves all of a model that FSDP will shard where it is."""
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trainer.args.device)

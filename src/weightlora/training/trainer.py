"""What ``fit`` asks of a trainer: how long it runs, how it splits batches, what a step costs, what must change."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from weightlora.cost import ActivationTrace, StepCost, counting, isolated_rng, operations, step_cost, trace
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.depth import checkpoint_blocks
from weightlora.training.inside import Inside, model_of
from weightlora.training.observed import Observed, first_step
from weightlora.training.undisturbed import given_back, undisturbed

log = logging.getLogger("weightlora")


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, as the trainer will count them."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with isolated_rng():
        return int(initial_values(trainer, trainer.get_train_dataloader())[-1])


def initial_values(trainer: Trainer, loader: DataLoader) -> tuple[int, ...]:
    """What the trainer counts before it begins: epochs, optimizer steps of an epoch, ..., steps of the run."""
    args, count = trainer.args, trainer.set_initial_training_values
    older = (
        (trainer.get_total_train_batch_size(args),) if "total_train_batch_size" in signature(count).parameters else ()
    )
    return tuple(count(args, loader, *older))  # type: ignore[arg-type]  # but for the loader's length, if it has none


def own_code(trainer: Trainer) -> str | None:
    """What a loss is computed by that neither Transformers nor TRL has written, or that makes batches as it trains.

    It may keep state anywhere, so that calling it once more than training does could be seen. Liger's kernels are put
    in as training begins: before, another computation would be counted. None if there is no such.
    """
    if trainer.args.use_liger_kernel:
        return "what use_liger_kernel puts in"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    for name, homes in (("compute_loss", ("transformers", "trl")), ("_prepare_inputs", ("transformers",))):
        if getattr(getattr(trainer, name), "__module__", "").partition(".")[0] not in homes:
            return f"{type(trainer).__name__}.{name}"
    return None


@contextlib.contextmanager
def step_counted(trainer: Trainer, wanted: bool) -> Iterator[Observed]:
    """Count the cost of the first micro-batch, of which training inside does not see a trace.

    It is computed once more before training, and everything is given back; where :func:`own_code` has a part in it, it
    is counted as training computes it. Where it cannot be counted, one line says so, and there is no cost.
    """
    if not wanted:
        yield Observed()
    elif own_code(trainer) is not None:
        with first_step(trainer) as seen:
            yield seen
    else:
        seen = Observed()
        try:
            seen.cost = measure_step(trainer)
        except AdapterError as error:
            log.warning("costs are not counted: %s", error)
        yield seen


def measure_step(trainer: Trainer) -> StepCost | None:
    """Count the cost of the first micro-batch; everything is given back. None without a batch.

    Raises:
        AdapterError: something failed on the way.
    """
    with first_loss(trainer) as loss:
        return None if loss is None else step_cost(trainer.model, loss)  # type: ignore[arg-type]


def _refuse_own_code(trainer: Trainer) -> None:
    own = own_code(trainer)
    if own is not None:
        raise AdapterError(f"{own} may only be called by training")


def trace_step(trainer: Trainer, *, stock: bool = False) -> ActivationTrace | None:
    """What the first micro-batch would keep, for any set of live adapters; nothing is computed. None without a batch.

    Raises:
        AdapterError: it cannot be traced, as :func:`weightlora.cost.trace`, or is computed by :func:`own_code`.
    """
    _refuse_own_code(trainer)
    with first_loss(trainer) as loss:
        return None if loss is None else trace(trainer.model, loss, stock=stock)  # type: ignore[arg-type]


def operations_of_step(trainer: Trainer) -> Callable[[Iterable[int]], int] | None:
    """Count what the first micro-batch takes with any set of live adapters, by one pass of the base.

    It is never too little, and too much by less than what one block takes. None without a batch.

    Raises:
        AdapterError: it failed, or is computed by :func:`own_code`.
        ScheduleError: as :func:`weightlora.cost.operations.operations`.
    """
    _refuse_own_code(trainer)
    with first_loss(trainer) as loss:
        return None if loss is None else operations(trainer.model, loss).total  # type: ignore[arg-type]


def first_batch(trainer: Trainer) -> object:
    """The first micro-batch of training as its loader gives it, read in this process; None without one.

    Call it inside :func:`undisturbed`; a loader, its samplers and its data set are as far as they were afterwards.
    """
    loader = trainer.get_train_dataloader()
    with given_back(loader):
        for part in (loader, getattr(loader, "base_dataloader", None)):
            if isinstance(part, DataLoader):
                part.num_workers = 0
                part.prefetch_factor = None
        return next(iter(loader), None)


@contextlib.contextmanager
def first_loss(trainer: Trainer) -> Iterator[Callable[[], Tensor] | None]:
    """The loss of the first micro-batch of training, as training computes it, for a count alone. None without a batch.

    Raises:
        AdapterError: something failed inside; everything is given back then, too.
    """
    with counting(), undisturbed(trainer):
        batch, model = first_batch(trainer), trainer.model
        if batch is None:
            yield None
            return
        model.train()  # type: ignore[union-attr]
        inputs = Inside(trainer).prepared(batch)
        yield lambda: loss_of(trainer, inputs)


def loss_of(trainer: Trainer, inputs: Mapping[str, object]) -> Tensor:
    """The loss of one prepared micro-batch, as the trainer computes it."""
    model = model_of(trainer)
    # accelerate wraps autocast around the model only inside train(); outside it must be on as well.
    with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, dict(inputs))  # type: ignore[return-value]


def checkpoint_as_in_training(trainer: Trainer) -> None:
    """Switch gradient checkpointing on with the arguments of now, as ``train`` will: what is measured is what runs."""
    settings, model = checkpointing_settings(trainer), trainer.model
    if settings is not None:
        layers = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
        checkpoint_blocks(model, settings or None, **layers)  # type: ignore[arg-type]


def checkpointing_settings(trainer: Trainer) -> dict[str, Any] | None:
    """What the arguments say of gradient checkpointing, by either name that Transformers has for it; None: off."""
    args: Any = trainer.args
    if not getattr(args, "activation_checkpointing", args.gradient_checkpointing):
        return None
    return dict(getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {})


def use_batch(trainer: Trainer, split: tuple[int, int] | None) -> None:
    """Give the trainer a (micro-batch, accumulation); None leaves it."""
    if split is not None:
        args = trainer.args
        args.per_device_train_batch_size, args.gradient_accumulation_steps = split
        Inside(trainer).follow_batch_size()


def split_batch(trainer: Trainer, micro_batch: int | None) -> tuple[int, int] | None:
    """(micro-batch, accumulation) with the trainer's effective batch, or a ConfigError."""
    if micro_batch is None:
        return None
    args = trainer.args
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if micro_batch < 1 or effective % micro_batch:
        fits = [size for size in range(1, effective + 1) if effective % size == 0]
        raise ConfigError(
            f"a micro-batch of {micro_batch} does not divide the effective batch of {effective}; use one of {fits}"
        )
    return micro_batch, effective // micro_batch


def average_micro_batches(trainer: Trainer) -> None:
    """Make the gradient the mean over the effective batch, however it is split.

    Many models take ``num_items_in_batch`` and ignore it (BERT's classifier does). The trainer then adds micro-batches
    up instead of averaging them, and a change of micro-batch at the seam would change the size of every gradient.
    """
    if not trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
        return
    losses: list[Tensor] = []
    model = model_of(trainer)
    for count in (1, 2):
        with undisturbed(trainer), torch.no_grad():
            batch = first_batch(trainer)
            if batch is None:
                return
            inputs = Inside(trainer).prepared(batch)
            losses.append(trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(count)))  # type: ignore[arg-type]
    if torch.equal(losses[0], losses[1]):
        trainer.model_accepts_loss_kwargs = False


def check_trainer(trainer: Trainer) -> None:
    """Refuse, with the remedy, what would give wrong numbers or fail later."""
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed is not supported, because adapters cannot be removed from the copies of parameters that its"
            " optimizer keeps; drop the DeepSpeed configuration and start with torchrun (DDP), or shard the base with"
            " FSDP2 (fsdp=True)"
        )
    started = get_int_from_env(["WORLD_SIZE"], 1)
    if started > 1 and trainer.args.world_size == 1:
        raise ConfigError(
            f"{started} processes were started, but each would train alone: Accelerate did not connect them; without a"
            " GPU set use_cpu=True in the trainer's arguments (--use-cpu)"
        )
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            "DataParallel is not supported: start one process per GPU with torchrun, or set"
            " CUDA_VISIBLE_DEVICES to one GPU"
        )
    if trainer.accelerator.scaler is not None:
        raise ConfigError("fp16 training scales the gradients that gates and scores are computed from; use bf16")
    if trainer.model_init is not None:
        raise ConfigError("model_init rebuilds the model inside train(); give the trainer a finished model instead")
    if trainer.args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size begins training anew with a smaller batch, after the method has counted steps and"
            " gradients; set it to False, and find the batch with `weightlora plan` or set micro_batch="
        )
    if trainer.train_dataset is None:
        raise ConfigError("the trainer has no train_dataset; give it one")
    if isinstance(trainer.train_dataset, Iterator):
        raise ConfigError(
            "train_dataset is an iterator, which can be read once, and the seam reads it again; give an"
            " IterableDataset whose __iter__ starts at the beginning"
        )


def unwrap(trainer: Trainer) -> None:
    """Let the trainer wrap its model anew, now that it has other parameters; a compiled one stays compiled.

    Accelerate marks what it has compiled as prepared, the mark lands on the model inside, and a second ``train`` would
    run that. The compiler sees by itself that the structure is another, and compiles once more.
    """
    wrapped = trainer.model_wrapped
    if getattr(wrapped, "_orig_mod", None) is not trainer.model:  # where torch.compile keeps what it has compiled
        trainer.model_wrapped = trainer.model  # type: ignore[assignment]  # there by now

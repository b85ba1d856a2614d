"""What would end or mislead a run later, found before its first step and before anything is changed."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import has_compiled_regions
from torch import nn
from transformers import Trainer

from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.adapters import adapter_name, has_adapters
from weightlora.graft.readiness import check_held, check_peft_model, check_ready
from weightlora.methods import METHODS, Method
from weightlora.training.inside import model_of


def check_fit(
    trainer: object, method: object, resume: object, before: object, after: object, log_omegas: object
) -> tuple[int | None, int | None]:
    """Refuse what :func:`weightlora.fit` was not made for.

    Returns:
        The micro-batches, as Python's own numbers.

    Raises:
        ConfigError: an argument is of another type.
    """
    if not isinstance(trainer, Trainer):
        what = "train it in a transformers.Trainer and give that" if isinstance(trainer, nn.Module) else "give one"
        raise ConfigError(
            f"fit takes a transformers.Trainer, not a {type(trainer).__name__}; {what}, or use weightlora.attach in a"
            " loop of your own"
        )
    check_method(method)
    if not isinstance(resume, bool | str | Path):
        raise ConfigError(f"resume={resume!r} is not allowed; use True, False or the path of a checkpoint")
    if log_omegas not in ("summary", "all"):
        raise ConfigError(f"log_omegas {log_omegas!r} is unknown; use one of summary, all")
    sizes = {"micro_batch": before, "final_micro_batch": after}
    first, final = (None if size is None else count(name, size) for name, size in sizes.items())
    return first, final


def check_method(method: object) -> None:
    """Refuse what is no method.

    Raises:
        ConfigError: a name, a class or anything else was given.
    """
    if isinstance(method, Method):
        return
    if isinstance(method, str) and method in METHODS:
        raise ConfigError(f"{method!r} is a method's name; give a method: weightlora.method({method!r}), with settings")
    if isinstance(method, type) and issubclass(method, Method):
        raise ConfigError(f"{method.__name__} is a class; give a method: weightlora.{method.__name__}()")
    raise ConfigError(
        f"method={method!r} is no method; give one such as weightlora.WeightLoRA(k=10), or weightlora.method(name)"
    )


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str | None = None) -> None:
    """Refuse a model whose adapters cannot train as they stand, or whose optimizer does not hold them.

    Raises:
        AdapterError: which adapters, and what to do.
        ConfigError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a model with LoRA adapters (peft.get_peft_model)")
    name = adapter_name(model, name)
    if has_compiled_regions(getattr(model, "_orig_mod", model)):
        raise AdapterError(
            "parts of the model are compiled by hand, which puts _orig_mod into the names of their layers; give the"
            " model as it is, and let the trainer compile it (torch_compile=True), or call model.compile()"
        )
    check_ready(model, name)
    if optimizer is not None:
        check_optimizer(model, optimizer, name)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimizer that lacks adapters; see :func:`weightlora.graft.readiness.check_held`."""
    check_held(model, name, [p for group in optimizer.param_groups for p in group["params"]])


def check_trainers_model(trainer: Trainer) -> None:
    """The same for a model in a trainer, which also has to write checkpoints that it can read.

    Raises:
        AdapterError: as :func:`check_model`; or injected adapters, or a compiled model.
    """
    model = model_of(trainer)
    name = adapter_name(model)
    if getattr(model, "_orig_mod", None) is not None:  # where torch.compile keeps what it has compiled
        raise AdapterError(
            "the model was compiled by hand, and the trainer cannot go on from a checkpoint of it; give the trainer"
            " the model as it is, and torch_compile=True"
        )
    check_peft_model(model)
    check_model(model, None if trainer.optimizer is None else torch_optimizer(trainer.optimizer), name)


def check_best(trainer: Trainer) -> None:
    """Refuse to promise the best weights where Transformers, which looks for them at one place alone, keeps the last.

    Raises:
        ConfigError: the adapter lies elsewhere in a checkpoint.
    """
    model = model_of(trainer)
    if trainer.args.load_best_model_at_end and has_adapters(model) and adapter_name(model) != "default":
        raise ConfigError(
            f"load_best_model_at_end loads only an adapter called 'default', and this one is {adapter_name(model)!r};"
            " give it that name, or set load_best_model_at_end=False"
        )


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer itself, where Accelerate has wrapped it.

    Raises:
        ConfigError: it is none.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}; give one torch.optim.Optimizer that holds the adapters"
        )
    return optimizer


def count(name: str, value: object) -> int:
    """A whole number of 1 or more, of any library.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"{name}={value!r} is not allowed; use a whole number, 1 or more")
    return int(value)

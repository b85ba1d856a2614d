"""What can be checked about a run before any weights or data are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError
from weightlora.runs.build import training_arguments
from weightlora.runs.config import RunConfig
from weightlora.tasks import MODELS, check_name


def check(config: RunConfig) -> None:
    """Raise if a run cannot work, as far as that shows without weights and data: method and its settings, budget,
    training arguments, batch sizes, names of task and model. (How many adapters there are is not known here.)

    Raises:
        WeightLoRAError: what is wrong, as the run itself would say it.
    """
    check_name(config.task)
    if config.task == "files" and config.train_file is None:
        raise ConfigError("task 'files' needs train_file, the path of a JSONL or CSV file; pass it")
    folder = Path(config.model).expanduser()
    path = folder.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1
    if config.model not in MODELS and path and not (folder / "config.json").is_file():
        raise ConfigError(f"model {config.model!r}: no folder with a config.json; pass a hub name, or such a folder")
    training_arguments(config, Path("unused"))


def describe(config: RunConfig, tuned: Collection[str] = ()) -> str:
    """The run in one line; ``tuned`` names the fields of ``TrainingArguments`` that are still to be chosen."""
    args: Any = training_arguments(config, Path("unused"))
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    settings = "".join(f", {name} {value}" for name, value in config.settings.items())
    rank = f" r {config.r} on {config.targets}" if config.make_method().has_adapters else ""
    chosen = {
        name: "tuned" if name in tuned else f"{getattr(args, name):g}" for name in ("learning_rate", "warmup_steps")
    }
    return (
        f"{config.method} ({config.preset}{settings}){rank}: {config.task}, {config.model}, {length} of {batch},"
        f" lr {chosen['learning_rate']}, warm-up {chosen['warmup_steps']}"
    )

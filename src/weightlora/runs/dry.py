"""What can be checked about a run before any weights or data are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from weightlora.errors import ConfigError
from weightlora.methods import PeftMethod
from weightlora.runs.build import training_arguments
from weightlora.runs.spec import RunSpec
from weightlora.tasks import MODELS, check_name
from weightlora.tasks.models import find_model


def check(spec: RunSpec) -> None:
    """Raise if a run cannot work, as far as that shows without weights and data: method and its settings, budget,
    training arguments, batch sizes, names of task and model. (How many adapters there are is not known here.)

    Raises:
        WeightLoRAError: what is wrong, as the run itself would say it.
    """
    check_name(spec.task.name)
    if spec.task.name == "files" and spec.task.train_file is None:
        raise ConfigError("task 'files' needs train_file, the path of a JSONL or CSV file; pass it")
    if spec.model.name not in MODELS:
        find_model(spec.model.name, ask_hub=False)
    training_arguments(spec, Path("unused"))


def describe(spec: RunSpec, tuned: Collection[str] = ()) -> str:
    """The run in one line; ``tuned`` names the fields of ``TrainingArguments`` that are still to be chosen."""
    args = training_arguments(spec, Path("unused"))
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    settings = "".join(f", {name} {value}" for name, value in spec.method.settings.items())
    rank = f" r {spec.model.r} on {spec.model.targets}" if isinstance(spec.make_method(), PeftMethod) else ""
    chosen = {
        name: "tuned" if name in tuned else f"{getattr(args, name):g}" for name in ("learning_rate", "warmup_steps")
    }
    return (
        f"{spec.method.name} ({spec.method.preset}{settings}){rank}: {spec.task.name}, {spec.model.name},"
        f" {length} of {batch}, lr {chosen['learning_rate']}, warm-up {chosen['warmup_steps']}"
    )

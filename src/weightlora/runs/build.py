"""From a run's configuration to the live parts: task, model with adapters, trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from weightlora.core.budget import parse_params
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters
from weightlora.methods import AdapterMethod, Method, PeftMethod, PlainMethod
from weightlora.runs.spec import RunSpec
from weightlora.runs.targets import TASK_TYPES, placed, rank_numbers, targets
from weightlora.runs.together import launched
from weightlora.tasks import (
    MODELS,
    LoadedModel,
    Prepared,
    Task,
    load_model,
    read_task,
    tell_once,
)
from weightlora.tasks.models import find_model
from weightlora.training import rows_to_hold_out

# Where the arguments of a run differ from Transformers' defaults.
TRAINING_DEFAULTS: dict[str, object] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 0.06,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
GENERATION = {"predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"}
FULL_LEARNING_RATE = 2e-4  # every weight moves: the adapters' rate would destroy the model; see docs/methods.md


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs, built and checked; nothing is written yet."""

    task: Task
    loaded: LoadedModel
    model: nn.Module
    method: Method
    rank: int
    prepared: Prepared
    max_steps: int

    @property
    def train(self) -> Dataset:
        """Tokenized rows to train on."""
        return self.prepared.train

    @property
    def validation(self) -> Dataset:
        """Tokenized rows to judge by."""
        return self.prepared.validation

    @property
    def task_type(self) -> str:
        """PEFT's name of what the model is for."""
        return TASK_TYPES[self.task.head]


def scored_on(spec: RunSpec, task: Task) -> dict[str, str | int | float]:
    """Which rows judge the run: ``split``, the numbers of ``rows`` and ``train_rows``, and how a part was drawn.

    ``also_trained_on`` counts those among them whose texts are in training rows as well, ``checkpoint`` is "best" where
    they chose it. Neither is there where there is nothing to say.
    """
    rows, train_rows = len(task.validation), len(task.train)
    where: dict[str, str | int | float] = {"split": "validation", "rows": rows, "train_rows": train_rows}
    if spec.task.splits_training_rows:
        where |= {"split": "train", "split_seed": spec.task.split_seed}
    if spec.task.holdout is not None:
        where["holdout"] = spec.task.holdout
    if task.seen_rows:
        where["also_trained_on"] = task.seen_rows
    if spec.training.arguments.get("load_best_model_at_end"):
        where["checkpoint"] = "best"
    return where


def tell_scored_on(spec: RunSpec, where: Mapping[str, object]) -> None:
    """Log what makes a score better than it would be on rows that nobody has looked at."""
    if seen := where.get("also_trained_on", 0):
        what = f"{seen} of {where['rows']} rows that judge the run have the texts of training rows"
        tell_once(logging.WARNING, f"{spec.task.data_name}: {what}; the record says so")
    if where.get("checkpoint") == "best":
        what = "the best checkpoint is chosen on the rows that judge the run, so its score is the best of several there"
        tell_once(logging.WARNING, f"{spec.task.data_name}: {what}; the record says so")


def task_of(spec: RunSpec) -> Task:
    """The run's task. A model that is not there is refused before any row is read."""
    if spec.model.name not in MODELS:
        find_model(spec.model.name)
    return read_task(spec.task, spec.model.name)


def base_model(spec: RunSpec, task: Task) -> LoadedModel:
    """The base with the task's head; what is new in it is drawn from the run's seed."""
    dtype = getattr(torch, spec.model.dtype) if spec.model.dtype else None
    return load_model(spec.model.name, **task.model_settings, seed=spec.training.seed, dtype=dtype)


def within_budget(spec: RunSpec, method: Method, loaded: LoadedModel) -> tuple[Method, int]:
    """The method and the rank that spend the run's budget of adapter parameters; as they are without one."""
    if spec.model.params is None:
        return method, spec.model.r
    kinds = [name.rpartition(".")[2] for name in targets(spec.model.targets, loaded)]
    return method.within(parse_params(spec.model.params), target_shapes(spec, loaded), spec.model.r, kinds)


def target_shapes(spec: RunSpec, loaded: LoadedModel) -> list[tuple[int, int]]:
    """What one rank has of numbers in A and in B of each target, in model order: ``(d_in, d_out)`` of a layer."""
    return [rank_numbers(loaded.model, name) for name in targets(spec.model.targets, loaded)]


def with_adapters(spec: RunSpec, task: Task, loaded: LoadedModel, method: PeftMethod, rank: int) -> peft.PeftModel:
    """A PEFT model with one adapter on each target; heads train and are saved. Drawn from the run's seed.

    Raises:
        ConfigError: this PEFT cannot wrap that model.
    """
    from transformers import set_seed

    set_seed(spec.training.seed)
    alpha = spec.model.alpha * rank / spec.model.r  # a budget changes the rank, not the scale
    lora = peft.LoraConfig(
        task_type=TASK_TYPES[task.head],
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]  # PEFT takes floats
        lora_dropout=spec.model.dropout,
        **placed(targets(spec.model.targets, loaded), loaded, spec.model.dropout),
        modules_to_save=list(loaded.heads),
    )
    wanted = method.peft_config(lora, target_shapes(spec, loaded))
    try:
        return peft.get_peft_model(loaded.model, wanted)
    except AttributeError as error:
        if "_prepare_encoder_decoder_kwargs_for_generation" not in str(error):
            raise
        # PEFT 0.20 looks for a method that Transformers 5.18 no longer has.
        kind = type(loaded.model).__name__
        raise ConfigError(
            f"PEFT {peft.__version__} cannot wrap {kind} of the installed Transformers: {error}; install peft>=0.21"
        ) from error


def check_shared(spec: RunSpec) -> None:
    """Check what a run needs whatever its method.

    Raises:
        WeightLoRAError: the task, its data, the model, the targets or the training arguments cannot be used.
    """
    training_arguments(spec, Path("unused"))
    targets(spec.model.targets, base_model(spec, task_of(spec)))


def check_method(spec: RunSpec) -> None:
    """Check what a run needs of its method; the rows are tokenized only where the number of steps depends on them.

    Raises:
        WeightLoRAError: whatever is wrong with method or schedule, or what :func:`build` finds.
    """
    steps = training_arguments(spec, Path("unused")).max_steps
    if steps <= 0 or spec.make_method().needs.held_out:
        build(spec)
        return
    _, _, chosen, _, model = _with_method(spec)
    if isinstance(chosen, AdapterMethod):
        chosen.begin(adapters(model), steps)


def build(spec: RunSpec, steps: int | None = None) -> Parts:
    """Load and check everything a run needs, without writing anything.

    Args:
        spec: the run.
        steps: of a run that goes on: how many optimizer steps it began with.

    Raises:
        WeightLoRAError: whatever is wrong with task, data, model, targets, method or schedule.
    """
    task, loaded, chosen, rank, model = _with_method(spec)
    prepared = task.prepare(loaded, spec.task.max_length)
    args = training_arguments(spec, Path("unused"), prepared)
    rows = len(prepared.train)
    held = rows_to_hold_out(rows, chosen.needs.held_out, args.per_device_eval_batch_size)
    counted = _steps(args, rows - held)  # also where it is known: the processes of a run meet here
    steps = steps or counted
    if isinstance(chosen, AdapterMethod):
        chosen.begin(adapters(model), steps)
    return Parts(
        task=task,
        loaded=loaded,
        model=model,
        method=chosen,
        rank=rank,
        prepared=prepared,
        max_steps=steps,
    )


def _with_method(spec: RunSpec) -> tuple[Task, LoadedModel, Method, int, PreTrainedModel | peft.PeftModel]:
    """Task, base, the method and the rank that spend the budget, and the model as the method trains it."""
    task = task_of(spec)
    loaded = base_model(spec, task)
    chosen, rank = within_budget(spec, spec.make_method(), loaded)
    if not chosen.learns and loaded.heads:
        raise ConfigError(
            f"method {chosen.name!r} does not train, but for {spec.task.data_name} model {spec.model.name!r}"
            f" gets a new head ({', '.join(loaded.heads)}) with random weights; use a model that answers in words"
        )
    if isinstance(chosen, PlainMethod):
        chosen.freeze(loaded.model, loaded.heads)
        return task, loaded, chosen, rank, loaded.model
    assert isinstance(chosen, PeftMethod)
    return task, loaded, chosen, rank, with_adapters(spec, task, loaded, chosen, rank)


def training_arguments(spec: RunSpec, output_dir: Path, prepared: Prepared | None = None) -> Seq2SeqTrainingArguments:
    """The trainer's arguments: our defaults, those of the task once it is prepared, the user's on top.

    Raises:
        ConfigError: an argument that Transformers refuses, or one that the run decides itself.
    """
    owned = {"output_dir", "seed", "data_seed"} & set(spec.training.arguments)
    if owned:
        raise ConfigError(f"{sorted(owned)[0]} is set by the run itself; use --out and --seed")
    own = {} if prepared is None else prepared.training
    generates = prepared is None or "predict_with_generate" in own
    if not generates and (idle := GENERATION & set(spec.training.arguments)):
        raise ConfigError(f"{sorted(idle)[0]} is set, but task {spec.task.name!r} generates no text; drop that setting")
    if (
        prepared is not None
        and prepared.ordered
        and spec.training.arguments.get("train_sampling_strategy") == "group_by_length"
    ):
        raise ConfigError(
            f"group_by_length reorders evaluation too, and task {spec.task.name!r} needs it in order; drop it"
        )
    values = {**TRAINING_DEFAULTS, **own, "seed": spec.training.seed, "output_dir": str(output_dir)}
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    # Else Accelerate would leave the processes of a launcher alone, each with the whole of the run.
    values["use_cpu"] = launched() > 1 and not torch.accelerator.is_available()
    if spec.method.name == "full":
        values["learning_rate"] = FULL_LEARNING_RATE
    values |= spec.training.arguments
    _check_numbers(values)
    effective = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    for name in ("micro_batch", "final_micro_batch"):
        size = getattr(spec.training, name)
        if size is not None and (size < 1 or effective % size):
            raise ConfigError(f"{name}={size} does not divide the effective batch of {effective}")
    if spec.training.micro_batch is not None:
        values["per_device_train_batch_size"] = spec.training.micro_batch
        values["gradient_accumulation_steps"] = effective // spec.training.micro_batch
    try:
        made = Seq2SeqTrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"the training arguments are not accepted: {' '.join(str(error).split())}") from None
    there = get_available_reporting_integrations()
    if absent := sorted(set(made.report_to or ()) - {*there, "flyte"}):  # the one that is not listed
        raise ConfigError(f"report_to={absent[0]!r} is not installed here; use one of {', '.join(['none', *there])}")
    return made


def _check_numbers(values: Mapping[str, float]) -> None:
    """Check what Transformers lets through and no run can have."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise ConfigError(f"{name}={values[name]} is not allowed; use 1 or more")
    if values["learning_rate"] < 0:
        raise ConfigError(f"learning_rate={values['learning_rate']} is negative; use 0 or more")
    if values.get("max_steps", -1) < -1:
        raise ConfigError(f"max_steps={values['max_steps']} is negative; use 1 or more, or leave it out")
    if values.get("max_steps") == 0 or (values.get("max_steps", -1) < 0 and values["num_train_epochs"] <= 0):
        raise ConfigError("the run has no step to train; use --max-steps or --num-train-epochs with more than 0")


def _steps(args: Seq2SeqTrainingArguments, rows: int) -> int:
    """Optimizer steps, as the trainer counts them."""
    together = int(args.world_size)  # asking for it makes the processes of a run meet
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(math.ceil(rows / args.train_batch_size) / together)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def make_trainer(parts: Parts, spec: RunSpec, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    """The task's trainer over the parts; its checkpoints go to ``folder/checkpoints``."""
    from transformers import PrinterCallback

    prepared = parts.prepared
    trainer = prepared.trainer(
        model=parts.model,
        args=training_arguments(spec, folder / "checkpoints", prepared),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,  # type: ignore[arg-type]  # it takes tuples too
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer

"""From a run's configuration to the live parts: task, model with adapters, trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from weightlora.core import parse_params
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft import adapters
from weightlora.methods import Method
from weightlora.runs.config import RunConfig
from weightlora.tasks import LoadedModel, Task, load_model, load_task, tokenize
from weightlora.training import rows_to_hold_out

# Where the arguments of a run differ from Transformers' defaults.
TRAINING_DEFAULTS: dict[str, Any] = {
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
FULL_LEARNING_RATE = 5e-5  # every weight moves: the adapters' rate would destroy the model


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs, built and checked; nothing is written yet."""

    task: Task
    loaded: LoadedModel
    model: nn.Module
    method: Method
    rank: int
    train: Dataset
    validation: Dataset
    max_steps: int

    def collator(self) -> DataCollatorWithPadding:
        """Pads to the longest of a batch."""
        return DataCollatorWithPadding(self.loaded.tokenizer)


def read_task(config: RunConfig) -> Task:
    """The task a configuration names."""
    path = {
        key: None if (value := getattr(config, key)) is None else Path(value)
        for key in ("data_dir", "train_file", "validation_file")
    }
    return load_task(
        config.task,
        **path,
        text_column=config.text_column,
        pair_column=config.pair_column,
        label_column=config.label_column,
        regression=config.regression,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples,
        holdout=config.holdout,
        # The same rows for every seed: seeds vary the model and the order, not the task.
        seed=0,
    )


def base_model(config: RunConfig, task: Task) -> LoadedModel:
    """The base with its new head, drawn from the run's seed."""
    return load_model(
        config.model, num_labels=task.num_labels, labels=task.labels, regression=task.is_regression, seed=config.seed
    )


def targets(patterns: str, loaded: LoadedModel) -> list[str]:
    """Full module names that "all-linear", "attention" or comma-separated name endings stand for.

    Raises:
        AdapterError: an ending matches no linear layer; the message lists the kinds there are.
    """
    return match_targets(patterns, loaded.linear_targets, loaded.attention_targets)


def match_targets(patterns: str, linear: Sequence[str], attention: Sequence[str]) -> list[str]:
    """:func:`targets` among the names of linear layers; `attention`: the endings that "attention" stands for."""
    if patterns == "all-linear":
        return list(linear)
    endings = tuple(attention) if patterns == "attention" else tuple(p.strip() for p in patterns.split(","))
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name in linear):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise AdapterError(
                f"no linear layer ends in {ending!r}; use all-linear, attention, or endings such as {', '.join(kinds)}"
            )
    return [n for n in linear if any(n == e or n.endswith(f".{e}") for e in endings)]


def within_budget(config: RunConfig, method: Method, loaded: LoadedModel) -> tuple[Method, int]:
    """The method and the rank that spend the run's budget of adapter parameters; as they are without one."""
    if config.params is None:
        return method, config.r
    return method.within(parse_params(config.params), target_shapes(config, loaded), config.r)


def target_shapes(config: RunConfig, loaded: LoadedModel) -> list[tuple[int, int]]:
    """``(d_in, d_out)`` of each target, in module order."""
    modules: list[Any] = [loaded.model.get_submodule(name) for name in targets(config.targets, loaded)]
    return [(int(module.in_features), int(module.out_features)) for module in modules]


def with_adapters(config: RunConfig, loaded: LoadedModel, method: Method, rank: int) -> peft.PeftModel:
    """A PEFT model with one adapter on each target; heads train and are saved. Drawn from the run's seed."""
    from transformers import set_seed

    set_seed(config.seed)
    alpha: Any = config.alpha * rank / config.r  # a budget changes the rank, not the scale
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config.dropout,
        target_modules=targets(config.targets, loaded),
        modules_to_save=list(loaded.heads),
    )
    return peft.get_peft_model(loaded.model, method.peft_config(lora, target_shapes(config, loaded)))


def build(config: RunConfig) -> Parts:
    """Load and check everything a run needs, without writing anything.

    Raises:
        WeightLoRAError: whatever is wrong with task, data, model, targets, method or schedule.
    """
    task = read_task(config)
    loaded = base_model(config, task)
    chosen, rank = within_budget(config, config.make_method(), loaded)
    model: PreTrainedModel | peft.PeftModel = loaded.model
    if chosen.trains != "full":
        model = with_adapters(config, loaded, chosen, rank)
    train, validation = tokenize(task, loaded.tokenizer, config.max_length)
    args = training_arguments(config, Path("unused"))
    held = rows_to_hold_out(len(train), chosen.held_out_batches, args.per_device_eval_batch_size)
    steps = _steps(args, len(train) - held)
    if chosen.uses_adapters:
        chosen.begin(adapters(model), steps)
    return Parts(
        task=task,
        loaded=loaded,
        model=model,
        method=chosen,
        rank=rank,
        train=train,
        validation=validation,
        max_steps=steps,
    )


def training_arguments(config: RunConfig, output_dir: Path) -> TrainingArguments:
    """The trainer's arguments: our defaults, the user's on top.

    Raises:
        ConfigError: an argument that Transformers refuses, or one that the run decides itself.
    """
    owned = {"output_dir", "seed", "data_seed"} & set(config.training)
    if owned:
        raise ConfigError(f"{sorted(owned)[0]} is set by the run itself; use --out and --seed")
    values = {**TRAINING_DEFAULTS, "seed": config.seed, "output_dir": str(output_dir)}
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    if config.method == "full":
        values["learning_rate"] = FULL_LEARNING_RATE
    values |= config.training
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise ConfigError(f"{name}={values[name]} is not allowed; use 1 or more")
    if values["learning_rate"] < 0:
        raise ConfigError(f"learning_rate={values['learning_rate']} is negative; use 0 or more")
    if values.get("max_steps") == 0 or (values.get("max_steps", -1) < 0 and values["num_train_epochs"] <= 0):
        raise ConfigError("the run has no step to train; use --max-steps or --num-train-epochs with more than 0")
    effective = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    if config.micro_batch is not None:
        if config.micro_batch < 1 or effective % config.micro_batch:
            raise ConfigError(f"micro_batch={config.micro_batch} does not divide the effective batch of {effective}")
        values["per_device_train_batch_size"] = config.micro_batch
        values["gradient_accumulation_steps"] = effective // config.micro_batch
    if config.final_micro_batch is not None and (config.final_micro_batch < 1 or effective % config.final_micro_batch):
        raise ConfigError(
            f"final_micro_batch={config.final_micro_batch} does not divide the effective batch of {effective}"
        )
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"the training arguments are not accepted: {' '.join(str(error).split())}") from None


def _steps(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps, as the trainer counts them."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(rows / args.train_batch_size)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def make_trainer(parts: Parts, config: RunConfig, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    """A stock trainer over the parts; its checkpoints go to ``folder/checkpoints``."""
    from transformers import PrinterCallback

    trainer = Trainer(
        model=parts.model,
        args=training_arguments(config, folder / "checkpoints"),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        data_collator=parts.collator(),
        compute_metrics=parts.task.compute_metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer

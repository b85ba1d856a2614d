"""From a run's configuration to the live parts: task, model with adapters, trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from weightlora.core import parse_params
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft import adapters, train_heads
from weightlora.methods import Method
from weightlora.runs.config import RunConfig
from weightlora.runs.together import launched
from weightlora.tasks import (
    Classification,
    Head,
    LoadedModel,
    Prepared,
    Task,
    by_answer_tokens,
    completes_text,
    lacks_validation,
    load_model,
    load_task,
    tell_once,
)
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
GENERATION = {"predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"}
# PEFT's name of what a model is for.
TASK_TYPES: dict[Head, str] = {
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "causal-lm": "CAUSAL_LM",
}
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


def read_task(config: RunConfig) -> Task:
    """The task a configuration names."""
    path = {
        key: None if (value := getattr(config, key)) is None else Path(value)
        for key in ("data_dir", "train_file", "validation_file")
    }
    task = load_task(
        config.task,
        **path,
        text_column=config.text_column,
        pair_column=config.pair_column,
        label_column=config.label_column,
        regression=config.regression,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples,
        holdout=config.holdout,
        doc_stride=config.doc_stride,
        max_answer_length=config.max_answer_length,
        null_score_diff_threshold=config.null_score_diff_threshold,
        max_target_length=config.max_target_length,
        seed=config.split_seed,
    )
    return _told_by(config, task)


def _told_by(config: RunConfig, task: Task) -> Task:
    """The task as its classes are told: by a new head, or by the answer tokens of a model that has words."""
    own = {"prompt": config.prompt, "label_words": config.label_words, "classify_by": config.classify_by}
    given = [name for name, value in own.items() if value is not None]
    if not isinstance(task, Classification):
        if given:
            raise ConfigError(f"{given[0]} belongs to classification, not to task {config.task!r}; drop it")
        return task
    chosen = config.classify_by
    if chosen is None:
        chosen = "answer" if not task.is_regression and completes_text(config.model) else "head"
    if chosen == "answer":
        return by_answer_tokens(task, config.prompt, config.label_words)
    if given and given != ["classify_by"]:
        raise ConfigError(f"{given[0]} is for classes told by answer tokens, and here a head tells them; drop it")
    return task


def scored_on(config: RunConfig, task: Task) -> dict[str, Any]:
    """Which rows judge the run: ``split``, the number of ``rows``, and how a part of the training rows was drawn.

    ``also_trained_on`` counts those among them whose texts are in training rows as well, ``checkpoint`` is "best" where
    they chose it. Neither is there where there is nothing to say.
    """
    where: dict[str, Any] = {"split": "validation", "rows": len(task.validation)}
    if config.holdout is not None or lacks_validation(config.task, config.validation_file):
        where |= {"split": "train", "split_seed": config.split_seed}
    if config.holdout is not None:
        where["holdout"] = config.holdout
    if task.seen_rows:
        where["also_trained_on"] = task.seen_rows
    if config.training.get("load_best_model_at_end"):
        where["checkpoint"] = "best"
    return where


def tell_scored_on(config: RunConfig, where: dict[str, Any]) -> None:
    """Log what makes a score better than it would be on rows that nobody has looked at."""
    if seen := where.get("also_trained_on", 0):
        what = f"{seen} of {where['rows']} rows that judge the run have the texts of training rows"
        tell_once(logging.WARNING, f"{data_name(config)}: {what}; the record says so")
    if where.get("checkpoint") == "best":
        what = "the best checkpoint is chosen on the rows that judge the run, so its score is the best of several there"
        tell_once(logging.WARNING, f"{data_name(config)}: {what}; the record says so")


def data_name(config: RunConfig) -> str:
    """The task, or the user's own training file, as a message names it."""
    return f"task {config.task!r}" if config.train_file is None else str(config.train_file)


def base_model(config: RunConfig, task: Task) -> LoadedModel:
    """The base with the task's head; what is new in it is drawn from the run's seed."""
    return load_model(config.model, **task.model_settings, seed=config.seed)


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
    kinds = [name.rpartition(".")[2] for name in targets(config.targets, loaded)]
    return method.within(parse_params(config.params), target_shapes(config, loaded), config.r, kinds)


def target_shapes(config: RunConfig, loaded: LoadedModel) -> list[tuple[int, int]]:
    """``(d_in, d_out)`` of each target, in module order."""
    modules: list[Any] = [loaded.model.get_submodule(name) for name in targets(config.targets, loaded)]
    return [(int(module.in_features), int(module.out_features)) for module in modules]


def with_adapters(config: RunConfig, task: Task, loaded: LoadedModel, method: Method, rank: int) -> peft.PeftModel:
    """A PEFT model with one adapter on each target; heads train and are saved. Drawn from the run's seed.

    Raises:
        ConfigError: this PEFT cannot wrap that model.
    """
    from transformers import set_seed

    set_seed(config.seed)
    alpha: Any = config.alpha * rank / config.r  # a budget changes the rank, not the scale
    lora = peft.LoraConfig(
        task_type=TASK_TYPES[task.head],
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config.dropout,
        target_modules=targets(config.targets, loaded),
        modules_to_save=list(loaded.heads),
    )
    wanted = method.peft_config(lora, target_shapes(config, loaded))
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


def check_shared(config: RunConfig) -> None:
    """Check what a run needs whatever its method.

    Raises:
        WeightLoRAError: the task, its data, the model, the targets or the training arguments cannot be used.
    """
    training_arguments(config, Path("unused"))
    targets(config.targets, base_model(config, read_task(config)))


def check_method(config: RunConfig) -> None:
    """Check what a run needs of its method; the rows are tokenized only where the number of steps depends on them.

    Raises:
        WeightLoRAError: whatever is wrong with method or schedule, or what :func:`build` finds.
    """
    steps = training_arguments(config, Path("unused")).max_steps
    if steps <= 0 or config.make_method().held_out_batches:
        build(config)
        return
    _, _, chosen, _, model = _with_method(config)
    if chosen.uses_adapters:
        chosen.begin(adapters(model), steps)


def build(config: RunConfig, steps: int | None = None) -> Parts:
    """Load and check everything a run needs, without writing anything.

    Args:
        config: the run.
        steps: of a run that goes on: how many optimizer steps it began with.

    Raises:
        WeightLoRAError: whatever is wrong with task, data, model, targets, method or schedule.
    """
    task, loaded, chosen, rank, model = _with_method(config)
    prepared = task.prepare(loaded, config.max_length)
    args = training_arguments(config, Path("unused"), prepared)
    rows = len(prepared.train)
    held = rows_to_hold_out(rows, chosen.held_out_batches, args.per_device_eval_batch_size)
    counted = _steps(args, rows - held)  # also where it is known: the processes of a run meet here
    steps = steps or counted
    if chosen.uses_adapters:
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


def _with_method(config: RunConfig) -> tuple[Task, LoadedModel, Method, int, PreTrainedModel | peft.PeftModel]:
    """Task, base, the method and the rank that spend the budget, and the model as the method trains it."""
    task = read_task(config)
    loaded = base_model(config, task)
    chosen, rank = within_budget(config, config.make_method(), loaded)
    if chosen.trains == "none" and loaded.heads:
        raise ConfigError(
            f"method {chosen.name!r} asks the model as it is, and for task {config.task!r} model {config.model!r} gets"
            f" a new head ({', '.join(loaded.heads)}) that knows nothing; use a model that answers in words"
        )
    if not chosen.has_adapters:
        if chosen.trains == "head":
            train_heads(loaded.model, loaded.heads)
        return task, loaded, chosen, rank, loaded.model
    return task, loaded, chosen, rank, with_adapters(config, task, loaded, chosen, rank)


def training_arguments(
    config: RunConfig, output_dir: Path, prepared: Prepared | None = None
) -> Seq2SeqTrainingArguments:
    """The trainer's arguments: our defaults, those of the task once it is prepared, the user's on top.

    Raises:
        ConfigError: an argument that Transformers refuses, or one that the run decides itself.
    """
    owned = {"output_dir", "seed", "data_seed"} & set(config.training)
    if owned:
        raise ConfigError(f"{sorted(owned)[0]} is set by the run itself; use --out and --seed")
    own = {} if prepared is None else prepared.training
    generates = prepared is None or "predict_with_generate" in own
    if not generates and (idle := GENERATION & set(config.training)):
        raise ConfigError(f"{sorted(idle)[0]} is set, but task {config.task!r} generates no text; drop it")
    if (
        prepared is not None
        and prepared.ordered
        and config.training.get("train_sampling_strategy") == "group_by_length"
    ):
        raise ConfigError(
            f"group_by_length reorders evaluation too, and task {config.task!r} needs it in order; drop it"
        )
    values = {**TRAINING_DEFAULTS, **own, "seed": config.seed, "output_dir": str(output_dir)}
    values["dataloader_pin_memory"] = torch.cuda.is_available()
    # Else Accelerate would leave the processes of a launcher alone, each with the whole of the run.
    values["use_cpu"] = launched() > 1 and not torch.accelerator.is_available()
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
        return Seq2SeqTrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"the training arguments are not accepted: {' '.join(str(error).split())}") from None


def _steps(args: Seq2SeqTrainingArguments, rows: int) -> int:
    """Optimizer steps, as the trainer counts them."""
    together = int(args.world_size)  # asking for it makes the processes of a run meet
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(math.ceil(rows / args.train_batch_size) / together)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def make_trainer(parts: Parts, config: RunConfig, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    """The task's trainer over the parts; its checkpoints go to ``folder/checkpoints``."""
    from transformers import PrinterCallback

    prepared = parts.prepared
    trainer = prepared.trainer(
        model=parts.model,
        args=training_arguments(config, folder / "checkpoints", prepared),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer

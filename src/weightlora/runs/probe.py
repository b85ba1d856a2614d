"""The paper's Figure 2, measured: how much each adapter would still change the loss, and which ones are selected."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from weightlora.errors import CheckpointError
from weightlora.files import write_text
from weightlora.graft.adapters import adapters
from weightlora.graft.forms import scalar_products
from weightlora.graft.selection import Choice
from weightlora.methods import AdapterMethod, LoRA
from weightlora.runs.build import Parts, base_model, build, make_trainer, with_adapters
from weightlora.runs.figure_specs import ProbeSpec
from weightlora.runs.lock import alone, refuse_busy
from weightlora.runs.progress import Progress
from weightlora.runs.record import collect_versions, machine
from weightlora.runs.spec import RunSpec
from weightlora.training import FitResult, fit
from weightlora.training.inside import Inside, model_of

Mode = Literal["cheap", "paper"]
PROBE = "probe.json"
PICTURE = "probe.png"


def probe(
    config: ProbeSpec,
    folder: Path,
    *,
    overwrite: bool = False,
    argv: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Measure ``<dL/dW_i, s B_i A_i>`` of every adapter after T steps, for every seed.

    ``folder/probe.json`` is written after each seed, and seeds that are in it are not measured again.

    Args:
        config: what to measure.
        folder: where the result lies.
        overwrite: begin anew, whatever is in `folder`.
        argv: the command line, for the file.
        say: takes a line of progress.

    Returns:
        What lies in ``probe.json``: the fields of :class:`weightlora.report.probe_plot.Probe`, and how they came about.

    Raises:
        WeightLoRAError: the settings cannot work, or the folder holds a probe with others.

    Source: paper, section 3.1 and Figure 2. Departs from it: T steps of the run's own schedule (the paper: "several
    epochs"), `gradient_rows` rows for the full gradient, dropout off while it is taken. The mode "cheap" is ours.
    """
    refuse_busy(folder)
    first = build(config.run.but(seed=config.seeds[0]))
    with alone(folder):
        return _measure(config, first, folder, overwrite, argv, say)


def _measure(
    config: ProbeSpec, first: Parts, folder: Path, overwrite: bool, argv: Sequence[str], say: Callable[[str], None]
) -> dict[str, object]:
    """The seeds that are not there yet, one after the other."""
    data = _begin(config, first, folder, overwrite)
    for seed in config.seeds:
        if seed in [entry["seed"] for entry in data["seeds"]]:
            say(f"seed {seed} is there already")
            continue
        say(f"seed {seed}: {config.mode} probe of {len(data['adapters'])} adapters, {data['steps']} steps")
        data["seeds"].append(_Seed(config, seed, data["steps"], say).measure())
        data["seeds"].sort(key=lambda entry: entry["seed"])
        data["argv"] = list(argv) or sys.argv
        write_text(folder / PROBE, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return data


def _begin(config: ProbeSpec, parts: Parts, folder: Path, overwrite: bool) -> dict[str, Any]:
    """The probe without seeds; with those of an earlier call that asked for the same."""
    assert isinstance(parts.method, AdapterMethod)
    policy = parts.method.begin(adapters(parts.model), parts.max_steps)
    data = {
        "mode": config.mode,
        "task": config.run.task.name,
        "model": config.run.model.name,
        "steps": parts.max_steps if policy.seam is None else policy.seam,
        "adapters": [{"name": a.name, "block": a.block, "kind": a.kind} for a in adapters(parts.model)],
        "seeds": [],
        "gradient_rows": min(config.gradient_rows, len(parts.train)),
        "config": config.run.but(seed=0).to_dict(),
        "versions": collect_versions(),
        "machine": machine(),
    }
    if not (folder / PROBE).exists() or overwrite:
        return data
    try:
        old = json.loads((folder / PROBE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / PROBE} cannot be read ({error}); remove it, or --overwrite it") from None
    asked = ("mode", "steps", "adapters", "gradient_rows", "config")
    if not isinstance(old, dict) or any(old.get(key) != data[key] for key in asked):
        raise CheckpointError(f"{folder} holds a probe with other settings; choose another --out, or --overwrite it")
    return {**data, "seeds": old["seeds"]}


class _Seed:
    """One seed's measurement."""

    def __init__(self, config: ProbeSpec, seed: int, steps: int, say: Callable[[str], None]) -> None:
        self.config, self.steps, self.say = config, steps, say
        self.run = config.run.with_training(save_strategy="no").but(seed=seed)
        self.parts = build(self.run)
        count = len(self.parts.train)
        # The same rows for every seed and adapter: what differs is what was trained.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        self.rows: Dataset = self.parts.train.select(sorted(order[: config.gradient_rows]))

    def measure(self) -> dict[str, object]:
        products, result = self._train(self.parts, self.run, f"seed {self.run.training.seed}", select_only=True)
        assert result.selection is not None
        if self.config.mode == "paper":
            products = self._one_at_a_time(result.selection.choices)
        return {
            "seed": self.run.training.seed,
            "products": [p if abs(p) < float("inf") else None for p in products],
            "selected": list(result.selection.names),
        }

    def _one_at_a_time(self, choices: Sequence[Choice]) -> list[float]:
        """A new model for each adapter, with that one alone."""
        found: list[float] = []
        began, log = time.monotonic(), logging.getLogger("weightlora")
        for number, choice in enumerate(choices):
            run = self.run.but(method="lora", settings={}, targets=choice.name)
            loaded = base_model(run, self.parts.task)
            plain = LoRA()
            parts = replace(self.parts, loaded=loaded, method=plain)
            parts = replace(parts, model=with_adapters(run, self.parts.task, loaded, plain, parts.rank))
            with _silent(log):  # about the one adapter that is kept
                found += self._train(parts, run, None)[0]
            left = (time.monotonic() - began) / (number + 1) * (len(choices) - number - 1)
            self.say(
                f"  seed {run.training.seed}: adapter {number + 1}/{len(choices)} {choice.name}"
                f"  about {left:.0f} s left"
            )
        return found

    def _train(
        self, parts: Parts, run: RunSpec, title: str | None, *, select_only: bool = False
    ) -> tuple[list[float], FitResult]:
        """Products after T steps, and what the run came to there."""
        watch = _Watch(self.steps, lambda trainer: self._products(trainer, parts), stop=not select_only)
        with tempfile.TemporaryDirectory(prefix="weightlora-probe-") as scratch:
            bar = None if title is None else Progress(f"probe of {run.task.name}, {title}")
            trainer = make_trainer(parts, run, Path(scratch), [watch] if bar is None else [watch, bar])
            watch.trainer = trainer
            set_seed(run.training.seed)
            try:
                result = fit(
                    trainer,
                    parts.method,
                    measure=False,
                    select_only=select_only,
                    micro_batch=run.training.micro_batch,
                    final_micro_batch=run.training.final_micro_batch,
                    engine=run.training.engine,  # type: ignore[arg-type]  # checked by the configuration
                )
            finally:
                if bar is not None:
                    bar.close()
        return watch.products, result

    def _products(self, trainer: Trainer, parts: Parts) -> list[float]:
        """The scalar products with the gradient of the mean loss over the probe's rows, dropout off."""
        model, inside = model_of(trainer), Inside(trainer)
        model.eval()
        model.zero_grad()
        collate = inside.collator(parts.prepared.collator)
        size = trainer.args.per_device_eval_batch_size
        for batch in DataLoader(self.rows, batch_size=size, collate_fn=collate):
            share = len(batch["labels"]) / len(self.rows)
            with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inside.prepared(batch))
            (loss * share).backward()  # type: ignore[operator]  # without return_outputs it is one tensor
        products = scalar_products(model)
        model.zero_grad()
        return products.tolist()


@contextlib.contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    def nothing(record: logging.LogRecord) -> bool:
        return False

    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)


class _Watch(TrainerCallback):
    """Reads the products after step T, before anything is disconnected; a run without a seam is ended there."""

    def __init__(self, step: int, read: Callable[[Trainer], list[float]], *, stop: bool) -> None:
        self.step, self.read, self.stop = step, read, stop
        self.trainer: Trainer | None = None
        self.products: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == self.step:
            assert self.trainer is not None
            self.products = self.read(self.trainer)
            control.should_training_stop = control.should_training_stop or self.stop

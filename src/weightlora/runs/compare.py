"""Methods against each other: equal task, model, steps, seeds; rates tuned equally on held-out training rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.methods import METHODS
from weightlora.runs.build import build, check_method, check_shared, read_task, training_arguments
from weightlora.runs.cluster import Cluster
from weightlora.runs.config import RunConfig
from weightlora.runs.jobs import Job, check_apart, execute, on_training_rows
from weightlora.runs.record import Record, check_metric
from weightlora.runs.run import finished, refused
from weightlora.tasks import LANGUAGE

log = logging.getLogger("weightlora")

TUNE_HOLDOUT = 0.1
TUNE_SEED = 0


def parse_method(text: str, preset: str = "recommended") -> tuple[str, str]:
    """ "name" or "name:preset".

    >>> parse_method("weightlora:paper")
    ('weightlora', 'paper')
    """
    name, _, own = text.partition(":")
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; the methods are {', '.join(METHODS)}")
    return name, own or preset


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    tune: Sequence[float] = (),
    metric: str | None = None,
    cluster: Cluster | None = None,
    say: Callable[[str], None] = log.info,
) -> list[Record]:
    """Run every method with every seed; what is finished already is not run again.

    Args:
        config: what all runs share; its preset is that of every method which names none.
        methods: "name" or "name:preset".
        seeds: one run per method and seed.
        folder: runs go to ``folder/<method>-<preset>/seed-<s>``, tuning runs to ``folder/tune/...``.
        tune: multiples of the learning rate (of each method's own default: full fine-tuning starts lower). Each method
            is first trained once with each on nine tenths of the *training* rows and judged on the other tenth; its
            best rate is used for its runs, which are judged on the validation rows; those play no part in the choice.
            The share that is held out is the configuration's ``holdout``, by default a tenth.
        metric: what runs are compared by: "eval_loss", or None for the task's own.
        cluster: as :func:`weightlora.runs.jobs.execute`.
        say: takes a line of progress.

    Returns:
        The records of all runs, failed ones included: a failure is recorded and the others go on. A method that cannot
        start gets such a record too, but no folder: there is nothing to resume.

    Raises:
        WeightLoRAError: task, data, model, targets or arguments cannot work, or no method can start; before the first
            run. Or a folder holds a run with other settings.
    """
    if any(not 0 < factor < math.inf for factor in tune):
        raise ConfigError(f"tune={','.join(f'{factor:g}' for factor in tune)} must be factors above 0, such as 0.3,1,3")
    folder = Path(folder)
    check_metric(metric)
    plan: dict[str, RunConfig] = {}
    for text in methods:
        name, preset = parse_method(text, config.preset)
        plan[f"{name}-{preset}"] = for_method(config, name, preset)
    waiting = [label for label in plan if not all(finished(folder / label / f"seed-{seed}") for seed in seeds)]
    failures = _cannot_start(config, {label: plan[label] for label in waiting}, of=len(plan))
    for label, why in failures.items():
        say(f"{label} cannot start: {why}")
    if tune:
        trials = {}
        for label, base in plan.items():
            if label not in failures and METHODS[base.method].trains != "none":
                default = training_arguments(base, folder).learning_rate
                trials[label] = _trials(base, [default * factor for factor in tune], folder / "tune" / label)
        check_apart(base for label, base in plan.items() if label in trials and label in waiting)
        tried = iter(execute([job for jobs in trials.values() for job in jobs], cluster=cluster, say=say))
        for label, jobs in trials.items():
            rate = _best(jobs, [next(tried).judged_by(metric) for _ in jobs])
            if rate is None:
                failures[label] = f"no learning rate worked; see {folder / 'tune' / label}"
                continue
            say(f"{label}: learning rate {rate:g}")
            training = {**plan[label].training, "learning_rate": rate}
            plan[label] = replace(plan[label], training=training, holdout=None)
    runs = [(label, replace(base, seed=seed)) for label, base in plan.items() for seed in seeds]
    jobs = [
        Job(config=run, folder=folder / label / f"seed-{run.seed}", title=f"{label}, seed {run.seed}")
        for label, run in runs
        if label not in failures
    ]
    done = iter(execute(jobs, cluster=cluster, say=say))
    own = read_task(config).metric if failures else ""
    records = [refused(run, failures[label], own) if label in failures else next(done) for label, run in runs]
    return [record.judged_by(metric) for record in records]


def all_methods(config: RunConfig) -> list[str]:
    """Every method that there can be for a task: asking the model as it is needs one that answers in words."""
    in_words = read_task(config).head in LANGUAGE
    return [name for name, kind in METHODS.items() if in_words or kind.trains != "none"]


def best_rate(config: RunConfig, rates: Sequence[float], folder: Path, say: Callable[[str], None]) -> float | None:
    """The learning rate with the best score on a held-out tenth of the training rows; the lower rate on a tie.

    None where every rate failed.
    """
    jobs = _trials(config, rates, folder)
    return _best(jobs, execute(jobs, say=say))


def _trials(config: RunConfig, rates: Sequence[float], folder: Path) -> list[Job]:
    """One run per rate, lowest first, judged on held-out training rows."""
    jobs = []
    for rate in sorted(float(f"{rate:.6g}") for rate in rates):
        training = {**config.training, "learning_rate": rate}
        trial = on_training_rows(replace(config, seed=TUNE_SEED, training=training), config.holdout or TUNE_HOLDOUT)
        jobs.append(Job(config=trial, folder=folder / f"lr-{rate:g}", title=f"tuning {config.method}, rate {rate:g}"))
    return jobs


def _best(jobs: Sequence[Job], records: Sequence[Record]) -> float | None:
    """The rate of the best record, the first on a tie; None where all failed."""
    results = [
        (record.merit, -index)
        for index, record in enumerate(records)
        if record.status == "ok" and record.merit is not None and record.merit == record.merit
    ]
    rate: float | None = jobs[-max(results)[1]].config.training["learning_rate"] if results else None
    return rate


def _cannot_start(config: RunConfig, plan: dict[str, RunConfig], of: int) -> dict[str, str]:
    """Why some methods of the plan cannot start: a mistake must show now, not after hours of other methods.

    Raises:
        WeightLoRAError: what they share cannot work, or none `of` all methods can start.
    """
    if plan:
        check_shared(config)
    errors: dict[str, WeightLoRAError] = {}
    for number, (label, base) in enumerate(plan.items()):
        try:
            if number:
                check_method(base)
            else:
                build(base)  # once with the rows tokenized: they are the same for every method
        except WeightLoRAError as error:
            errors[label] = error
    if errors and len(errors) == of:
        label, first = next(iter(errors.items()))
        raise type(first)(f"{plan[label].method}: {first}")
    return {label: str(why) for label, why in errors.items()}


def for_method(config: RunConfig, name: str, preset: str) -> RunConfig:
    """The shared settings, less those that this method does not have (``k`` for plain LoRA, say)."""
    own = METHODS[name].settings()
    settings = {key: value for key, value in config.settings.items() if key in own}
    return replace(config, method=name, preset=preset, settings=settings)

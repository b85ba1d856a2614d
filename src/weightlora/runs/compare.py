"""Methods against each other: equal task, model, steps, seeds; rates tuned equally on held-out training rows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.methods import METHODS
from weightlora.runs.build import build, training_arguments
from weightlora.runs.cluster import Cluster
from weightlora.runs.config import RunConfig
from weightlora.runs.jobs import Job, execute, on_training_rows
from weightlora.runs.record import Record
from weightlora.runs.run import finished

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
    folder: Path,
    *,
    tune: Sequence[float] = (),
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
            best rate is used for its runs. Validation rows play no part in that.
        cluster: as :func:`weightlora.runs.jobs.execute`.
        say: takes a line of progress.

    Returns:
        The records of all runs, failed ones included: a failure is recorded and the others go on.

    Raises:
        WeightLoRAError: settings that cannot work, before the first run.
    """
    if any(not 0 < factor < math.inf for factor in tune):
        raise ConfigError(f"tune={','.join(f'{factor:g}' for factor in tune)} must be factors above 0, such as 0.3,1,3")
    plan: dict[str, RunConfig] = {}
    for text in methods:
        name, preset = parse_method(text, config.preset)
        plan[f"{name}-{preset}"] = for_method(config, name, preset)
    for label, base in plan.items():
        if not all(finished(folder / label / f"seed-{seed}") for seed in seeds):
            with _named(base.method):
                build(base)  # a mistake must show now, not after hours of other methods
    if tune:
        trials = {}
        for label, base in plan.items():
            default = training_arguments(base, folder).learning_rate
            trials[label] = _trials(base, [default * factor for factor in tune], folder / "tune" / label)
        tried = iter(execute([job for jobs in trials.values() for job in jobs], cluster=cluster, say=say))
        for label, jobs in trials.items():
            rate = _best(jobs, [next(tried) for _ in jobs])
            say(f"{label}: learning rate {rate:g}")
            plan[label] = replace(plan[label], training={**plan[label].training, "learning_rate": rate})
    jobs = [
        Job(
            config=replace(base, seed=seed),
            folder=folder / label / f"seed-{seed}",
            title=f"{label}, seed {seed}",
        )
        for label, base in plan.items()
        for seed in seeds
    ]
    return execute(jobs, cluster=cluster, say=say)


def best_rate(config: RunConfig, rates: Sequence[float], folder: Path, say: Callable[[str], None]) -> float:
    """The learning rate with the best score on a held-out tenth of the training rows; the lower rate on a tie.

    Raises:
        ConfigError: every rate failed.
    """
    jobs = _trials(config, rates, folder)
    return _best(jobs, execute(jobs, say=say))


def _trials(config: RunConfig, rates: Sequence[float], folder: Path) -> list[Job]:
    """One run per rate, lowest first, judged on held-out training rows."""
    jobs = []
    for rate in sorted(float(f"{rate:.6g}") for rate in rates):
        training = {**config.training, "learning_rate": rate}
        trial = on_training_rows(replace(config, seed=TUNE_SEED, training=training), TUNE_HOLDOUT)
        jobs.append(Job(config=trial, folder=folder / f"lr-{rate:g}", title=f"tuning {config.method}, rate {rate:g}"))
    return jobs


def _best(jobs: Sequence[Job], records: Sequence[Record]) -> float:
    """The rate of the best record; the first on a tie."""
    results = [
        (record.score, -index)
        for index, record in enumerate(records)
        if record.status == "ok" and record.score is not None and record.score == record.score
    ]
    if not results:
        rates = [job.config.training["learning_rate"] for job in jobs]
        raise ConfigError(
            f"no learning rate of {rates} worked for {jobs[0].config.method}; see {jobs[0].folder.parent}"
        )
    rate: float = jobs[-max(results)[1]].config.training["learning_rate"]
    return rate


def for_method(config: RunConfig, name: str, preset: str) -> RunConfig:
    """The shared settings, less those that this method does not have (``k`` for plain LoRA, say)."""
    own = {f.name for f in fields(METHODS[name])}
    settings = {key: value for key, value in config.settings.items() if key in own}
    return replace(config, method=name, preset=preset, settings=settings)


@contextlib.contextmanager
def _named(method: str) -> Iterator[None]:
    """Say which method an error is about."""
    try:
        yield
    except WeightLoRAError as error:
        raise type(error)(f"{method}: {error}") from None

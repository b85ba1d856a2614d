"""Methods against each other: equal task, model, steps, seeds; rates tuned equally on held-out training rows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.methods import METHODS
from weightlora.runs.build import build, training_arguments
from weightlora.runs.config import CONFIG, RunConfig
from weightlora.runs.record import Record
from weightlora.runs.run import RECORD, finished, resume, train

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
    say: Callable[[str], None] = log.info,
) -> list[Record]:
    """Run every method with every seed, one after the other; what is finished already is not run again.

    Args:
        config: what all runs share; its preset is that of every method which names none.
        methods: "name" or "name:preset".
        seeds: one run per method and seed.
        folder: runs go to ``folder/<method>-<preset>/seed-<s>``, tuning runs to ``folder/tune/...``.
        tune: multiples of the learning rate (of each method's own default: full fine-tuning starts lower). Each method
            is first trained once with each on nine tenths of the *training* rows and judged on the other tenth; its
            best rate is used for its runs. Validation rows play no part in that.
        say: takes a line of progress.

    Returns:
        The records of all runs, failed ones included: a failure is recorded and the others go on.

    Raises:
        WeightLoRAError: settings that cannot work, before the first run.
    """
    if any(not 0 < factor < math.inf for factor in tune):
        raise ConfigError(f"tune={','.join(f'{factor:g}' for factor in tune)} must be factors above 0, such as 0.3,1,3")
    plan = []
    for text in methods:
        name, preset = parse_method(text, config.preset)
        plan.append((name, preset, _for_method(config, name, preset)))
    for name, preset, base in plan:
        if not all(finished(folder / f"{name}-{preset}" / f"seed-{seed}") for seed in seeds):
            with _named(name):
                build(base)  # a mistake must show now, not after hours of other methods
    records = []
    for number, (name, preset, base) in enumerate(plan):
        label = f"{name}-{preset}"
        chosen = base
        if tune:
            default = training_arguments(base, folder).learning_rate
            rate = best_rate(base, [default * factor for factor in tune], folder / "tune" / label, say)
            chosen = replace(base, training={**base.training, "learning_rate": rate})
        for seed in seeds:
            say(f"[{number + 1}/{len(plan)}] {label}, seed {seed}")
            records.append(_once(replace(chosen, seed=seed), folder / label / f"seed-{seed}"))
            outcome = records[-1]
            say(f"    {outcome.error}" if outcome.status != "ok" else f"    {outcome.metric} {outcome.score:.4f}")
    return records


def best_rate(config: RunConfig, rates: Sequence[float], folder: Path, say: Callable[[str], None]) -> float:
    """The learning rate with the best score on a held-out tenth of the training rows; the lower rate on a tie.

    Raises:
        ConfigError: every rate failed.
    """
    results: list[tuple[float, float]] = []
    for rate in sorted(float(f"{rate:.6g}") for rate in rates):
        trial = replace(
            config, seed=TUNE_SEED, holdout=TUNE_HOLDOUT, training={**config.training, "learning_rate": rate}
        )
        record = _once(trial, folder / f"lr-{rate:g}")
        if record.status == "ok" and record.score is not None and record.score == record.score:
            results.append((record.score, rate))
        say(
            f"    tuning {config.method}: rate {rate:g} gives {record.score if record.status == 'ok' else record.error}"
        )
    if not results:
        raise ConfigError(f"no learning rate of {sorted(rates)} worked for {config.method}; see {folder}")
    best = max(score for score, _ in results)
    return next(rate for score, rate in results if score == best)


def _for_method(config: RunConfig, name: str, preset: str) -> RunConfig:
    """The shared settings, less those that this method does not have (``k`` for plain LoRA, say)."""
    from dataclasses import fields

    own = {f.name for f in fields(METHODS[name])}
    settings = {key: value for key, value in config.settings.items() if key in own}
    return replace(config, method=name, preset=preset, settings=settings)


def _once(config: RunConfig, folder: Path) -> Record:
    """Run, resume, or read what is there, if it is the same run."""
    if (folder / CONFIG).is_file():
        if RunConfig.load(folder).to_dict() != config.to_dict():
            raise ConfigError(f"{folder} holds a run with other settings; choose another --out, or remove it")
        if finished(folder):
            return Record.read(folder / RECORD)
        return resume(folder)
    with _named(config.method):
        return train(config, folder)


@contextlib.contextmanager
def _named(method: str) -> Iterator[None]:
    """Say which method an error is about."""
    try:
        yield
    except WeightLoRAError as error:
        raise type(error)(f"{method}: {error}") from None

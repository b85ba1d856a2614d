"""Methods against each other: equal task, model, steps, seeds; rates tuned equally on held-out training rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.methods import METHODS
from weightlora.runs.build import build, check_shared, training_arguments
from weightlora.runs.config import CONFIG, RunConfig
from weightlora.runs.record import Record
from weightlora.runs.run import RECORD, finished, refused, resume, train

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
        The records of all runs, failed ones included: a failure is recorded and the others go on. A method that cannot
        start gets such a record too, but no folder: there is nothing to resume.

    Raises:
        WeightLoRAError: task, data, model, targets or arguments cannot work, or no method can start; before the first
            run. Or a folder holds a run with other settings.
    """
    if any(not 0 < factor < math.inf for factor in tune):
        raise ConfigError(f"tune={','.join(f'{factor:g}' for factor in tune)} must be factors above 0, such as 0.3,1,3")
    plan = []
    for text in methods:
        name, preset = parse_method(text, config.preset)
        plan.append((name, preset, _for_method(config, name, preset)))
    failures = _cannot_start(config, plan, seeds, folder)
    records = []
    for number, (name, preset, base) in enumerate(plan):
        label = f"{name}-{preset}"
        if number in failures:
            say(f"[{number + 1}/{len(plan)}] {label} cannot start: {failures[number]}")
            records += [refused(replace(base, seed=seed), failures[number]) for seed in seeds]
            continue
        chosen = base
        if tune:
            default = training_arguments(base, folder).learning_rate
            rate = best_rate(base, [default * factor for factor in tune], folder / "tune" / label, say)
            if rate is None:
                why = f"no learning rate worked; see {folder / 'tune' / label}"
                records += [refused(replace(base, seed=seed), why) for seed in seeds]
                continue
            chosen = replace(base, training={**base.training, "learning_rate": rate})
        for seed in seeds:
            say(f"[{number + 1}/{len(plan)}] {label}, seed {seed}")
            records.append(_once(replace(chosen, seed=seed), folder / label / f"seed-{seed}"))
            outcome = records[-1]
            say(f"    {outcome.error}" if outcome.status != "ok" else f"    {outcome.metric} {outcome.score:.4f}")
    return records


def best_rate(config: RunConfig, rates: Sequence[float], folder: Path, say: Callable[[str], None]) -> float | None:
    """The learning rate with the best score on a held-out tenth of the training rows; the lower rate on a tie.

    None where every rate failed.
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
    best = max((score for score, _ in results), default=None)
    return next((rate for score, rate in results if score == best), None)


def _cannot_start(
    config: RunConfig, plan: Sequence[tuple[str, str, RunConfig]], seeds: Sequence[int], folder: Path
) -> dict[int, str]:
    """Why some methods of the plan cannot start: a mistake must show now, not after hours of other methods."""
    waiting = [
        number
        for number, (name, preset, _) in enumerate(plan)
        if not all(finished(folder / f"{name}-{preset}" / f"seed-{seed}") for seed in seeds)
    ]
    if waiting:
        check_shared(config)
    errors: dict[int, WeightLoRAError] = {}
    for number in waiting:
        try:
            build(plan[number][2])
        except WeightLoRAError as error:
            errors[number] = error
    if errors and len(errors) == len(plan):
        raise type(errors[0])(f"{plan[0][0]}: {errors[0]}")
    return {number: str(error) for number, error in errors.items()}


def _for_method(config: RunConfig, name: str, preset: str) -> RunConfig:
    """The shared settings, less those that this method does not have (``k`` for plain LoRA, say)."""
    from dataclasses import fields

    own = {f.name for f in fields(METHODS[name])}
    settings = {key: value for key, value in config.settings.items() if key in own}
    return replace(config, method=name, preset=preset, settings=settings)


def _once(config: RunConfig, folder: Path) -> Record:
    """Run, resume, or read what is there, if it is the same run; a refusal on the way is a failure like another."""
    there = (folder / CONFIG).is_file()
    if there and RunConfig.load(folder).to_dict() != config.to_dict():
        raise ConfigError(f"{folder} holds a run with other settings; choose another --out, or remove it")
    if there and finished(folder):
        return Record.read(folder / RECORD)
    try:
        return resume(folder) if there else train(config, folder)
    except WeightLoRAError as error:
        return refused(config, str(error))

"""Is the selection worth its name? Every method tuned alike, five seeds, differences paired over seeds.

    python benchmarks/evidence.py run --data-dir DATA --tasks sst2,stsb,mrpc
    python benchmarks/evidence.py show

``run`` goes through the stages below, the most telling first; what is finished, or is in
``benchmarks/results/evidence.json``, is not run again, so it can be stopped at any time and gone on with elsewhere.
``show`` adds to that file what there is, draws the picture and prints the tables.

The learning rate of each method is chosen once per task, with K = 10 and rank 8, on a held-out tenth of the training
rows, and used for all its K and ranks. The scale alpha / r is 4 throughout.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from scipy import stats

from adapter_path import write
from weightlora.runs.record import Record
from weightlora.runs.run import RECORD, finished
from weightlora.runs.spec import RunSpec
from weightlora.study.grid import on_training_rows
from weightlora.study.jobs import Job, execute, run_name

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results" / "evidence.json"
CHOSEN_ON = ("sst2", "stsb", "mrpc")
CONFIRMED_ON = ("qqp", "mnli")  # looked at once, after the rules were settled
RATES = (3e-3, 1e-3, 3e-4)
SEEDS = (0, 1, 2, 3, 4)
TRAINING = {
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
    "bf16": True,
    "use_cpu": True,
}
SELECTORS = ("weightlora", "random", "top", "gradient")

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "T=0.05": {"settings": {"select_after": 0.05}},
    "coverage": {"settings": {"score": "coverage"}},
    "coverage, T=0.05": {"settings": {"score": "coverage", "select_after": 0.05}},
    "ramp": {"training": {"warmup_steps": 0.15}},  # the learning rate rises until T: low while all adapters train
}
Row = tuple[str, int | None, int, str | None]  # method or method:preset, K, rank, variant
STAGES: dict[str, list[Row]] = {
    "K=10": [("lora", None, 8, None), *((name, 10, 8, None) for name in SELECTORS)],
    "rules": [("weightlora", 10, 8, "T=0.05")],
    "K=5": [(name, 5, 8, None) for name in SELECTORS],
    "rules, K=5": [("weightlora", 5, 8, "T=0.05")],
    "growth": [("weightlora+", 10, 8, None), ("weightlora+", 10, 2, None), ("lora", None, 2, None)],
    "K=1": [(name, 1, 8, None) for name in SELECTORS],
    "equal parameters": [("weightlora", 7, 8, "T=0.05")],
    "ramp": [(name, 10, 8, "ramp") for name in ("weightlora", "gradient")],
    "ramp, others": [("lora", None, 8, "ramp"), *((name, 10, 8, "ramp") for name in ("random", "top"))],
    "paper": [("weightlora:paper", 10, 8, None)],
    "coverage": [("weightlora", 5, 8, "coverage")],
    "coverage, T=0.05, K=5": [("weightlora", 5, 8, "coverage, T=0.05")],
    "coverage, T=0.05, K=10": [("weightlora", 10, 8, "coverage, T=0.05")],
    "ranks": [(name, k, r, None) for r in (1, 4) for name, k in (("lora", None), ("weightlora+", 10))],
}


def label(row: Row) -> str:
    """A row's name in tables and files."""
    name, k, rank, variant = row
    return name + (f" {variant}" if variant else "") + (f", K={k}" if k else "") + f", r={rank}"


def config(task: str, data_dir: str, row: Row, rate: float, seed: int) -> RunSpec:
    """One run of a row."""
    name, k, rank, variant = row
    method, _, preset = name.partition(":")
    change = VARIANTS[variant] if variant else {}
    settings = ({} if k is None else {"k": k}) | change.get("settings", {})
    run = {"task": task, "data_dir": data_dir, "model": "minilm", "max_train_samples": 6000, "seed": seed}
    adapters = {"r": rank, "alpha": 4.0 * rank, "method": method, "preset": preset or "recommended"}
    training = {**TRAINING, "learning_rate": rate, **change.get("training", {})}
    return RunSpec.of(run, adapters, settings, training)


def tuned(row: Row) -> Row:
    """The row whose learning rate this one uses: the same method, as it comes, with K = 10 and rank 8."""
    name, k, _, _ = row
    return name, k and 10, 8, None


def job(one: RunSpec, folder: Path) -> Job:
    """A run of the study; its folder follows from its settings."""
    title = f"{one.task.name}, {one.method.name}, seed {one.training.seed}"
    return Job(spec=one, folder=folder / run_name(one), title=title)


def trial(args: argparse.Namespace, task: str, row: Row, rate: float) -> Job:
    """The run that judges a learning rate on held-out training rows."""
    return job(on_training_rows(config(task, args.data_dir, tuned(row), rate, seed=0)), args.out / "tune")


def rate_of(tried: Callable[[float], float | None]) -> float | None:
    """From the highest rate down, until a lower one is worse; None where a score that is needed is not there."""
    best: tuple[float, float] | None = None
    for rate in RATES:
        score = tried(rate)
        if score is None:
            return None
        if best is not None and score < best[0]:
            break
        best = score, rate
    return None if best is None else best[1]


Known = dict[tuple[str, str], dict[str, Any]]


def known() -> Known:
    """The result file's rows by task and label, keyed by rate and seed as they were."""
    if not RESULTS.is_file():
        return {}
    rows = json.loads(RESULTS.read_text())["rows"]
    for one in rows:
        one["trials"] = {float(rate): score for rate, score in one["trials"].items()}
        for name in PER_SEED:
            one[name] = {int(seed): value for seed, value in one[name].items()}
    return {(one["task"], one["row"]): one for one in rows}


def run(args: argparse.Namespace) -> None:
    """Every stage, row, task and seed that is not there yet."""
    there = known()

    def tried(task: str, row: Row, rate: float) -> float:
        before = there.get((task, label(tuned(row))))
        if before is not None and rate in before["trials"]:
            return float(before["trials"][rate])
        (record,) = execute([trial(args, task, row, rate)], quiet=True, say=say)
        return record.score if record.status == "ok" and record.score is not None else -math.inf

    for stage in args.stages or STAGES:
        for row, task in itertools.product(STAGES[stage], args.tasks):
            rate = rate_of(functools.partial(tried, task, row))
            assert rate is not None
            done = there.get((task, label(row)), {}).get("scores", {})
            runs = [config(task, args.data_dir, row, rate, seed) for seed in SEEDS if seed not in done]
            execute([job(one, args.out / "runs") for one in runs], quiet=True, say=say)


def say(line: str) -> None:
    print(line, flush=True)


def read(one: Job) -> Record | None:
    """The record of a finished run."""
    return Record.read(one.folder / RECORD) if finished(one.folder) else None


PER_SEED = ("scores", "kept", "params", "kept_activation_bytes", "flops_per_step", "seconds_per_step")


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What there is of every row and task: scores by seed, what was kept, what it cost; known rows are added to."""
    there, found = known(), []
    for row, task in itertools.product(dict.fromkeys(itertools.chain(*STAGES.values())), CHOSEN_ON + CONFIRMED_ON):
        one = there.get((task, label(row))) or {"task": task, "row": label(row), "trials": {}}
        tuning = there.get((task, label(tuned(row))), {}).get("trials", {})
        tries = {rate: record.score for rate in RATES if (record := read(trial(args, task, row, rate))) is not None}
        one["trials"] = tuning | tries | one["trials"]
        rate = rate_of(one["trials"].get)
        if rate is None:
            continue
        assert one.setdefault("rate", rate) == rate, (one["row"], task)
        for seed in SEEDS:
            record = read(job(config(task, args.data_dir, row, rate, seed), args.out / "runs"))
            if record is None or seed in one.get("scores", {}):
                continue
            last = record.phases[-1]
            values = (record.score, [adapter.name for adapter in record.kept], (record.budget or {}).get("effective"),
                      last.kept_activation_bytes, last.flops_per_step, last.seconds_per_step)  # fmt: skip
            for name, value in zip(PER_SEED, values, strict=True):
                one.setdefault(name, {})[seed] = value
            ran_with = {"versions": record.versions, "machine": record.machine}
            if ran_with not in one.setdefault("ran_with", []):
                one["ran_with"].append(ran_with)
        if one.get("scores"):
            found.append(one)
    return found


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95% interval (Student's t)."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def against(rows: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, Any] | None:
    """`one` minus `other`, seed by seed: per task, and averaged over the tasks that have both."""
    scores = {(found["task"], found["row"]): found["scores"] for found in rows}
    tasks = [task for task, name in scores if name == one and (task, other) in scores]
    paired = {task: {seed: scores[task, one][seed] - scores[task, other][seed]
                     for seed in SEEDS if seed in scores[task, one] and seed in scores[task, other]}
              for task in tasks}  # fmt: skip
    seeds = [seed for seed in SEEDS if tasks and all(seed in paired[task] for task in tasks)]
    if not seeds:
        return None
    means = [statistics.mean(paired[task][seed] for task in tasks) for seed in seeds]
    return {
        "one": one, "other": other, "tasks": {task: interval(list(paired[task].values())) for task in tasks},
        "all": interval(means), "seeds": len(seeds),
        "wins": sum(d > 0 for task in tasks for d in paired[task].values()),
        "pairs": sum(len(paired[task]) for task in tasks),
    }  # fmt: skip


def pairs() -> list[tuple[str, str]]:
    """The comparisons that the three questions ask for."""

    def over(one: str, k: int, others: Sequence[str], at: int | None = None) -> list[tuple[str, str]]:
        return [(f"{one}, K={k}, r=8", f"{other}, K={at or k}, r=8") for other in others]

    credit, short, spread, paper = SELECTORS[0], "weightlora T=0.05", "weightlora coverage, T=0.05", "weightlora:paper"
    rest = SELECTORS[1:]
    found = over(credit, 10, rest) + over(credit, 5, rest) + over(credit, 1, rest) + over(credit, 5, ["random"], at=10)
    found += over(short, 10, SELECTORS) + over(short, 5, SELECTORS) + over(short, 7, rest, at=10)
    found += over(spread, 10, [short, *SELECTORS]) + over(spread, 5, [short, *SELECTORS])
    found += over("weightlora coverage", 5, [credit]) + over(paper, 10, [short, *SELECTORS])
    found += over("weightlora ramp", 10, [credit, *(f"{other} ramp" for other in rest)])
    found += [("weightlora ramp, K=10, r=8", "lora ramp, r=8"), (f"{credit}, K=10, r=8", "lora, r=2")]
    found += [(f"{one}, K=10, r=8", "lora, r=8") for one in (credit, short, spread, paper)]
    return found + [(f"weightlora+, K=10, r={r}", f"lora, r={r}") for r in (8, 4, 2, 1)]


def points(value: tuple[float, float, float]) -> str:
    return "{:+.1f} ({:+.1f}, {:+.1f})".format(*(100 * number for number in value))


def tables(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """The scores and the differences as Markdown."""
    by = {(one["row"], one["task"]): one for one in rows}
    lines = [
        "| what | " + " | ".join(tasks) + " | rate | parameters | kept | per step |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for name in dict.fromkeys(one["row"] for one in rows):
        mine = [by[name, task] for task in tasks if (name, task) in by]
        cells = []
        for task in tasks:
            scores = [100 * score for score in by[name, task]["scores"].values()] if (name, task) in by else []
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            fewer = f" ({len(scores)})" if 0 < len(scores) < len(SEEDS) else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}{fewer}" if scores else "")
        over = {key: [v for one in mine for v in one[key].values() if v is not None]
                for key in ("params", "kept_activation_bytes", "flops_per_step")}  # fmt: skip
        mean = {key: statistics.mean(values) for key, values in over.items() if values}
        cost = f"{mean['kept_activation_bytes'] / 2**20:.0f} MiB | {mean['flops_per_step'] / 1e9:.1f} G"
        rates = "/".join(f"{one['rate']:g}" for one in mine)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {rates} | {mean.get('params', 0) / 1e3:.0f} k | {cost} |")
    lines += [
        "",
        "| difference, points | " + " | ".join(tasks) + " | mean of tasks | seeds won |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for one in found:
        cells = [points(one["tasks"][task]) if task in one["tasks"] else "" for task in tasks]
        name = f"`{one['one']}` - `{one['other']}`"
        average = points(one["all"]) if len(one["tasks"]) == len(tasks) else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {average} | {one['wins']} of {one['pairs']} |")
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], path: Path) -> None:
    """Score against kept bytes for every row that all tasks have, and the differences with their intervals."""
    tasks = list(dict.fromkeys(one["task"] for one in rows))
    names = [name for name in dict.fromkeys(one["row"] for one in rows)
             if sum(one["row"] == name for one in rows) == len(tasks)]  # fmt: skip
    whole = [one for one in found if len(one["tasks"]) == len(tasks)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 2 + len(whole) / 5), layout="constrained")
    colors = matplotlib.colormaps["tab20"]
    for number, name in enumerate(names):
        mine = [one for one in rows if one["row"] == name]
        kept = statistics.mean(statistics.mean(one["kept_activation_bytes"].values()) for one in mine) / 2**20
        score = 100 * statistics.mean(statistics.median(one["scores"].values()) for one in mine)
        left.scatter(kept, score, marker="osD^v<>PX*hd8p"[number % 14], color=colors(number % 20), s=60, label=name)
    left.set(xlabel="kept for backward, MiB (mean over tasks and seeds)",
             ylabel="points (median over seeds, mean over tasks)")  # fmt: skip
    figure.legend(fontsize=8, loc="outside lower center", ncol=5)
    for height, one in enumerate(reversed(whole)):
        mean, low, high = (100 * number for number in one["all"])
        right.plot([low, high], [height, height], color="tab:blue")
        right.plot(mean, height, "o", color="tab:blue")
    right.set_yticks(range(len(whole)), [f"{one['one']}  minus  {one['other']}" for one in reversed(whole)], fontsize=8)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(xlabel="points, mean over tasks, 95% interval over seeds", xlim=(-32, 32))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(args: argparse.Namespace) -> None:
    """Results as a file, a picture and tables."""
    rows = collect(args)
    if not rows:
        print(f"SKIPPED: no finished runs in {args.out}; make some with `python benchmarks/evidence.py run`")
        return
    result: dict[str, Any] = {"benchmark": "evidence", "command": "python benchmarks/evidence.py run --data-dir DATA"}
    result |= {"training": TRAINING, "rows": rows}
    for name, tasks in ("comparisons", CHOSEN_ON), ("confirmation", CONFIRMED_ON):
        mine = [one for one in rows if one["task"] in tasks]
        if not mine:
            continue
        found = result[name] = [one for pair in pairs() if (one := against(mine, *pair)) is not None]
        if name == "comparisons":
            picture(mine, found, Path(__file__).parents[1] / "docs" / "evidence.png")
        print(f"\n{name}\n\n{tables(mine, found, list(dict.fromkeys(one['task'] for one in mine)))}")
    write(RESULTS, result)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="show", choices=("run", "show"))
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--tasks", default=",".join(CHOSEN_ON), help="to run", type=lambda text: text.split(","))
    parser.add_argument("--stages", default="", type=lambda text: [s for s in text.split(";") if s], help="a;b")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    (run if args.what == "run" else show)(args)


if __name__ == "__main__":
    main()

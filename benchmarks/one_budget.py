"""All methods at one parameter budget on real tasks, each compared with plain LoRA, seed by seed.

    python benchmarks/one_budget.py --data-dir DATA
    python benchmarks/one_budget.py --data-dir DATA --tasks qqp --max-eval-samples 1500
    python benchmarks/one_budget.py --data-dir DATA --methods weightlora --select-after 0.05 --name one-budget-T5
    python benchmarks/one_budget.py --tasks sst2,stsb,qqp show
    python benchmarks/one_budget.py --tasks sst2,stsb,qqp --name one-budget-T5 show
    python benchmarks/one_budget.py --data-dir DATA --tasks mrpc --methods lora,weightlora,random,top \\
        --tune 0.3,1,3 --seeds 0,1,2,3,4 --name tuned

Runs ``weightlora compare`` per task (what is finished already is not run again) and writes one file per task: each
seed's score, kept adapters, parameters, and the difference from LoRA on the same seeds with a 95% interval (paired t).
What the file holds already stays in it, so that methods and seeds can be added: ``--seeds 3,4``. ``show`` runs
nothing: it prints these files, and by how much `weightlora` is ahead of each other method on average over the tasks;
with another ``--name`` also of the methods in the first files.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from adapter_path import write
from evidence import against, points
from weightlora.cli.main import main as weightlora
from weightlora.methods import METHODS
from weightlora.runs.record import Record

SUFFIX = "-recommended"
BASE = "lora" + SUFFIX
NAME = "one-budget"


Runs = dict[str, dict[int, dict[str, Any]]]  # by method and seed
PER_SEED = ("score", "kept", "budget", "kept_activation_bytes", "training")


def ran(folder: Path) -> Runs:
    """Finished runs below a folder; tuning runs left out."""
    found: Runs = {}
    for path in sorted(folder.glob("runs/*/record.json")):
        record = Record.read(path)
        if record.status == "ok" and record.score is not None:
            row = f"{record.method}-{record.config['preset']}"
            found.setdefault(row, {})[record.seed] = {
                "score": record.score,
                "kept": len(record.kept),
                "budget": record.budget,
                "kept_activation_bytes": record.phases[-1].kept_activation_bytes,
                "training": record.config["training"],
                "ran_with": {"versions": record.versions, "machine": record.machine},
            }
    return found


def known(path: Path, command: list[str]) -> Runs:
    """The runs that a result file holds already, made by the same command but for its methods and seeds."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if settings(shlex.split(content["command"])[1:]) != settings(command):
        raise SystemExit(f"{path} was made by `{content['command']}`; give these runs another --name")
    return {
        name: {
            seed: {key: found[key][place] for key in PER_SEED} | {"ran_with": found["ran_with"][found["with"][place]]}
            for place, seed in enumerate(found["seeds"])
        }
        for name, found in content["rows"].items()
    }


def settings(command: list[str]) -> dict[str, str]:
    """What all runs of a command have in common: its flags but for methods and seeds."""
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    return {flag: value for flag, value in flags.items() if flag not in ("--methods", "--seeds")}


def row(mine: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Scores, and the paired difference from `base` over the seeds that both have."""
    seeds = sorted(mine)
    found: dict[str, Any] = {"seeds": seeds} | {key: [mine[seed][key] for seed in seeds] for key in PER_SEED}
    found |= {"mean": statistics.mean(found["score"]), "spread": None, "ran_with": [], "with": []}
    if len(seeds) > 1:
        found["spread"] = statistics.stdev(found["score"])
    for seed in seeds:
        if mine[seed]["ran_with"] not in found["ran_with"]:
            found["ran_with"].append(mine[seed]["ran_with"])
        found["with"].append(found["ran_with"].index(mine[seed]["ran_with"]))
    both = [seed for seed in seeds if seed in base]
    if base and mine is not base and len(both) > 1:
        here, there = ([one[seed]["score"] for seed in both] for one in (mine, base))
        low, high = stats.ttest_rel(here, there).confidence_interval(0.95)
        differences = [one - other for one, other in zip(here, there, strict=True)]
        found["from_lora"] = {"mean": statistics.mean(differences), "low": float(low), "high": float(high)}
    return found


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of a task, best first."""
    lines = ["| method | score | from LoRA, 95% | alive | parameters in effect | kept |", "|---|---|---|---|---|---|"]
    most = max(len(found["seeds"]) for found in rows.values())
    for name, found in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        difference, kept = found.get("from_lora"), found["kept"]
        alive = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)}-{max(kept)}"
        alive = alive if max(kept) else "-"
        effective = [(budget or {}).get("effective") for budget in found["budget"]]
        spread = "" if found["spread"] is None else f" ± {found['spread']:.4f}"
        interval = (
            ""
            if difference is None
            else f"{difference['mean']:+.4f} ({difference['low']:+.3f}, {difference['high']:+.3f})"
        )
        size = f"{statistics.mean(effective) / 1e3:.0f} k" if all(effective) else "-"
        memory = statistics.mean(found["kept_activation_bytes"]) / 2**20
        fewer = f" ({len(kept)} seeds)" if len(kept) < most else ""
        score = f"{found['mean']:.4f}{spread}{fewer}"
        lines.append(f"| `{name.removesuffix(SUFFIX)}` | {score} | {interval} | {alive} | {size} | {memory:.0f} MiB |")
    return "\n".join(lines)


def result(name: str, task: str) -> Path:
    return Path(__file__).parent / "results" / f"{name}-{task}.json"


def scores(task: str, rows: dict[str, dict[str, Any]], of: str = "") -> list[dict[str, Any]]:
    """What `against` compares: each method's score by seed."""
    return [
        {
            "task": task,
            "row": name.removesuffix(SUFFIX) + of,
            "scores": dict(zip(one["seeds"], one["score"], strict=True)),
        }
        for name, one in rows.items()
    ]


def show(args: argparse.Namespace) -> None:
    """The stored tables, and `weightlora` against each other method over all of these tasks."""
    rows = []
    for task in args.tasks.split(","):
        if not result(args.name, task).is_file():
            print(f"SKIPPED {task}: {result(args.name, task)} is not there; run this script for it first")
            continue
        content = json.loads(result(args.name, task).read_text())
        print(f"\n{task}: `{content['command']}`\n\n{markdown(content['rows'])}")
        rows += scores(task, content["rows"])
        if args.name != NAME and result(NAME, task).is_file():
            rows += scores(task, json.loads(result(NAME, task).read_text())["rows"], of=f", {NAME}")
    tasks = list(dict.fromkeys(one["task"] for one in rows))
    print(f"\n| `weightlora` minus | {' | '.join(tasks)} | mean of tasks | won |\n{'|---' * (len(tasks) + 3)}|")
    others = dict.fromkeys(one["row"] for one in rows if one["row"] != "weightlora")
    found = [one for name in others if (one := against(rows, "weightlora", name)) and len(one["tasks"]) == len(tasks)]
    for one in sorted(found, key=lambda one: one["all"][0]):
        cells = [points(one["tasks"][task]) for task in tasks]
        print(f"| `{one['other']}` | {' | '.join(cells)} | {points(one['all'])} | {one['wins']} of {one['pairs']} |")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "show"))
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--tasks", default="sst2,stsb")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--tune", default="", help="multiples of the default learning rate, chosen on held-out rows")
    parser.add_argument("--params", default="166k")
    parser.add_argument("--max-steps", default="60")
    parser.add_argument("--max-train-samples", default="4000")
    parser.add_argument("--max-eval-samples", default="", help="default: the whole validation set")
    parser.add_argument("--select-after", default="", help="T of the methods that have one; default: the method's own")
    parser.add_argument("--name", default=NAME, help="of the result files")
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.what == "show":
        show(args)
        return
    for task in args.tasks.split(","):
        if not (Path(args.data_dir) / task).is_dir():
            print(f"SKIPPED {task}: {args.data_dir}/{task} is not there; name the folder with --data-dir")
            continue
        words = ["compare", "--methods", args.methods, "--task", task, "--data-dir", args.data_dir, "--model", "minilm",
                 "--params", args.params, "--seeds", args.seeds, "--max-steps", args.max_steps,
                 "--max-train-samples", args.max_train_samples]  # fmt: skip
        words += ["--max-eval-samples", args.max_eval_samples] if args.max_eval_samples else []
        words += ["--select-after", args.select_after] if args.select_after else []
        words += ["--tune", args.tune] if args.tune else []
        shown = ["DATA" if word == args.data_dir else word for word in words]
        path = result(args.name, task)
        found = known(path, shown)
        weightlora([*words, "--out", str(args.out / task)])
        for name, mine in ran(args.out / task).items():
            found[name] = found.get(name, {}) | mine
        seeds = sorted({seed for mine in found.values() for seed in mine})
        names = [name.removesuffix(SUFFIX) for name in found]
        shown[shown.index("--seeds") + 1] = ",".join(map(str, seeds))
        shown[shown.index("--methods") + 1] = "all" if set(METHODS) - {"zero-shot"} <= set(names) else ",".join(names)
        command = shlex.join(["weightlora", *shown])
        rows = {name: row(mine, found.get(BASE, {})) for name, mine in found.items()}
        write(path, {"benchmark": args.name, "command": command, "task": task, "model": "minilm", "rows": rows})
        print(f"\n{task}: `{command}`\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()

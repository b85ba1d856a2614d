"""Which score tells where adapters should go? A table of many random sets of adapters, each trained once.

    python benchmarks/placement.py run --ground smollm2-sst2 --data-dir DATA
    python benchmarks/placement.py judge

``run`` goes through the stages below and writes ``benchmarks/results/placement-GROUND.json`` after every trial; what is
there is not run again. Every later score can be judged by that table without training: see ``judge``.

The ground (a model and a task) must qualify first: LoRA on all adapters, at its tuned rate, must beat a head alone (or
the model as it is) by five standard errors of the difference over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy import stats

from adapter_path import write
from benchlib.ground import Ground, Outcome, Settings
from benchlib.judging import load, partial, value
from benchlib.signals import all_scores
from weightlora.core import coverage, place
from weightlora.runs.record import collect_versions, machine

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
GROUNDS = {
    "smollm2-sst2": Settings(model="smollm2", task="sst2", steps=64, batch=8, judged_rows=218),
    "smollm2-cola": Settings(model="smollm2", task="cola", steps=64, batch=8, judged_rows=261),
    "minilm-sst2": Settings(model="minilm", task="sst2", steps=150, batch=16, judged_rows=436),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SETS = 60
FAR = 0.3  # nats above the best: a run that lost its way
# Compared directly: the rule that was the default, and the one that told random sets apart best by its sum.
RULES = ("credit", "weight times gradient (GoRA)")
# Stated before they were run, and corrected by Holm's procedure; all other comparisons are exploration.
DECIDING = (
    ("half kept, credit", "half kept, all upper"),
    ("half kept, credit", "half kept, chance"),
    ("half kept, credit", "all"),
)
DIRECT_SEEDS = (1, 2, 3)
DECIDING_SEEDS = (*DIRECT_SEEDS, 4, 5)  # the last two were added when the first three had been looked at
TUNE_SEEDS = (100, 101)
SET_SEED = 1  # of initial values and rows, in every trial of a random set
SCORE_SEED = 1000  # scores are measured on other batches than sets are trained on
CONTROL_SEED = 77


def random_sets(blocks: Sequence[int], kinds: Sequence[str], count: int) -> list[list[int]]:
    """Sets with sizes log-uniform from 1 to 40% of n, spread over depth and kinds; every other one has a random lowest
    block."""
    n, top = len(blocks), max(blocks) + 1
    draw = random.Random(2026)
    found: list[list[int]] = []
    for number in range(count):
        size = round(math.exp(draw.uniform(0, math.log(0.4 * n))))
        low = draw.randrange(top) if number % 2 else 0
        allowed = [i for i in range(n) if blocks[i] >= low]
        # One of each stratum (a third of the depth, a kind) in turn, in random order, so that sets are spread.
        strata: dict[tuple[int, str], list[int]] = {}
        for i in draw.sample(allowed, len(allowed)):
            strata.setdefault((3 * (blocks[i] - low) // (top - low), kinds[i]), []).append(i)
        order = draw.sample(list(strata.values()), len(strata))
        mixed = [members[turn] for turn in range(n) for members in order if turn < len(members)]
        found.append(sorted(mixed[:size]))
    return found


class Study:
    """One ground's results, on disk after every trial."""

    def __init__(self, name: str, data_dir: str, results: Path = RESULTS) -> None:
        self.name, self.path = name, results / f"placement-{name}.json"
        self.settings = GROUNDS[name]
        self.ground = Ground(self.settings, data_dir)
        g = self.ground
        self.blocks = [g.block_of(i) for i in range(len(g.names))]
        self.kinds = [name.rpartition(".")[2] for name in g.names]
        asked = dataclasses.asdict(self.settings)
        self.data: dict[str, Any] = {
            "command": f"python benchmarks/placement.py run --ground {name} --data-dir DATA",
            "settings": asked,
            "threads": torch.get_num_threads(),
            "adapters": [
                {"name": a, "block": b, "kind": k} for a, b, k in zip(g.names, self.blocks, self.kinds, strict=True)
            ],
            "rates": {}, "scores": {}, "trials": [],
        }  # fmt: skip
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if old["settings"] != asked:
                raise SystemExit(f"{self.path} has other settings: {old['settings']}; move it away")
            self.data |= old
        self.data["ran_with"] = {"versions": collect_versions(), "machine": machine()}

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=None, separators=(",", ":")) + "\n")
        os.replace(temporary, self.path)

    def trial(self, label: str, indices: Sequence[int], seed: int, rate: float, **more: Any) -> dict[str, Any]:
        """The trial of that label and seed, run now if it is not there."""
        for one in self.data["trials"]:
            if (one["label"], one["seed"], one["rate"]) == (label, seed, rate):
                return dict(one)
        head = more.pop("head", False)
        ground = self.ground
        out: Outcome = ground.readout(seed) if head else ground.trial(indices, seed=seed, rate=rate, **more)
        one = {"label": label, "seed": seed, "rate": rate, "set": list(indices), **dataclasses.asdict(out)} | more
        self.data["trials"].append(one)
        self.save()
        print(
            f"{self.name}: {label}, seed {seed}, rate {rate}: {out.nats:.4f} nats, {out.accuracy:.4f}, {out.seconds} s",
            flush=True,
        )
        return one

    def tuned(self) -> float:
        """LoRA's best rate for all adapters, by held-out loss over two seeds of its own."""
        n = len(self.blocks)
        first = {rate: self.trial("all", range(n), TUNE_SEEDS[0], rate)["nats"] for rate in RATES}
        # What is far behind already is not tried again.
        near = [rate for rate in RATES if first[rate] < min(first.values()) + 0.1]
        second = {rate: self.trial("all", range(n), TUNE_SEEDS[1], rate)["nats"] for rate in near}
        return min(near, key=lambda rate: first[rate] + second[rate])

    def run(self, stages: Sequence[str]) -> None:
        """The stages, in the order in which they tell the most."""
        rate = self.tuned()
        self.data["rate"] = rate
        for name, stage in (
            ("scores", self._scores),
            ("qualify", self._qualify),
            ("direct", self._direct),
            ("sets", self._sets),
            ("longer", self._longer),
            ("rates", self._rates),
        ):
            if name in stages:
                stage(rate)
        self.save()

    def _scores(self, rate: float) -> None:
        if str(SCORE_SEED) in self.data["scores"]:
            return
        scores, sums = all_scores(self.ground, SCORE_SEED, rate, steps=self.settings.steps // 2, batches=12)
        self.data["scores"][str(SCORE_SEED)] = scores
        self.data.setdefault("sums", {})[str(SCORE_SEED)] = sums
        self.save()

    def _qualify(self, rate: float) -> None:
        for seed in (1, 2):
            self.trial("all", range(len(self.blocks)), seed, rate)
            if self.ground.answers is not None:
                self.trial("head alone", [], seed, rate, head=True)
            for head_rate in (1e-3, 5e-3) if self.ground.heads else (1e-3,):
                self.trial(f"none, head rate {head_rate}", [], seed, rate, head_rate=head_rate)

    def _direct(self, rate: float) -> None:
        """What was stated before comes first."""
        decide = {label for pair in DECIDING for label in pair}
        rows = sorted(self.direct(), key=lambda row: row[0] not in decide)
        for seed in DECIDING_SEEDS:
            for label, chosen, more in rows:
                if label in decide or seed in DIRECT_SEEDS:
                    self.trial(label, chosen, seed, rate, **more)

    def _sets(self, rate: float) -> None:
        for number, chosen in enumerate(random_sets(self.blocks, self.kinds, SETS)):
            self.trial(f"random {number}", chosen, SET_SEED, rate)

    def _longer(self, rate: float) -> None:
        """Whether training was long enough for LoRA on all."""
        for seed in DIRECT_SEEDS:
            steps = self.settings.steps * 3 // 2
            self.trial("all, half as many steps more", range(len(self.blocks)), seed, rate, steps=steps)

    def _rates(self, rate: float) -> None:
        """Whether a smaller set wants another rate than all."""
        label, chosen, more = next(row for row in self.direct() if row[0] == DECIDING[0][0])
        for seed in TUNE_SEEDS:
            for other in RATES:
                self.trial(label, chosen, seed, other, **more)

    def direct(self) -> list[tuple[str, list[int], dict[str, Any]]]:
        """Choices of the rules and of the controls: name, set, other settings.

        Each at half of what LoRA on all keeps for backward, and at a tenth of the adapters.
        """
        n, scores, costs = len(self.blocks), self.data["scores"][str(SCORE_SEED)], self.ground.placement_costs()
        half, k = costs.total(range(n)) // 2, max(1, n // 10)
        draw = random.Random(CONTROL_SEED)
        upper = next(b for b in range(max(self.blocks) + 1) if costs.total(self._above(b)) <= half)
        rows: list[tuple[str, list[int], dict[str, Any]]] = [("all", list(range(n)), {})]
        rows += [("half kept, all upper", self._above(upper), {})]
        one_each = (self._widest_above(b) for b in range(max(self.blocks) + 1))
        rows += [("half kept, one a block", next(chosen for chosen in one_each if costs.total(chosen) <= half), {})]
        chance = [draw.random() for _ in range(n)]
        for rule in RULES:
            rows += [(f"half kept, {rule}", list(place(scores[rule], costs, half).chosen), {})]
        rows += [("half kept, chance", list(place(chance, costs, half).chosen), {})]
        first = []
        for rule in RULES:
            best = sorted(range(n), key=lambda i, rule=rule: -scores[rule][i])[:k]  # type: ignore[misc]
            first = first or best
            rows += [(f"K={k}, {rule}", sorted(best), {})]
        spread = coverage(scores[RULES[0]], self.blocks, k)
        rows += [(f"K={k}, {RULES[0]}, spread", spread, {})]
        rows += [(f"K={k}, matched chance", self._matched(first, draw), {})]
        rows += [(f"K={k}, deepest", list(range(n - k, n)), {}), ("all, rank 1", list(range(n)), {"rank": 1})]
        wide = [i for i, name in enumerate(self.ground.names) if name.endswith(("up_proj", "intermediate.dense"))]
        rows += [("feed-forward in", wide, {})]
        return rows

    def _above(self, block: int) -> list[int]:
        return [i for i, b in enumerate(self.blocks) if b >= block]

    def _widest_above(self, block: int) -> list[int]:
        """The adapter with the most parameters in each block from `block` up; of equal ones the first."""
        size = self.data["scores"][str(SCORE_SEED)]["parameters"]
        of_block = {b: [i for i in self._above(block) if self.blocks[i] == b] for b in self.blocks if b >= block}
        return sorted(max(members, key=lambda i: size[i]) for members in of_block.values())

    def _matched(self, chosen: Sequence[int], draw: random.Random) -> list[int]:
        """As many of each kind, from anywhere: the same parameters."""
        found: list[int] = []
        for kind in sorted({self.kinds[i] for i in chosen}):
            same = [i for i, k in enumerate(self.kinds) if k == kind]
            found += draw.sample(same, sum(self.kinds[i] == kind for i in chosen))
        return sorted(found)


def judge(path: Path) -> dict[str, Any]:
    """Every score against the random sets of one ground, and against each other."""
    data = json.loads(path.read_text())
    sets, scores, adapters = load(str(path))
    blocks = [int(a["block"]) for a in adapters]
    scores["chance"] = [random.Random(i).random() for i in range(len(adapters))]
    loss = np.array([one["nats"] for one in sets], dtype=float)
    known = np.array(
        [[one["params"], len(one["set"]), min(blocks[i] for i in one["set"])] for one in sets], dtype=float
    )
    names = ("parameters", "count", "lowest block")
    found: dict[str, Any] = {
        "ground": data["settings"], "sets": len(sets), "rate": data.get("rate"),
        "spearman with loss": {n: float(stats.spearmanr(known[:, i], loss)[0]) for i, n in enumerate(names)},
        "partial": {}, "between scores": {},
    }  # fmt: skip
    for name, values in scores.items():
        for spread in (False, True):
            of_sets = np.array([value(values, one["set"], blocks, spread=spread) for one in sets])
            if np.ptp(of_sets) > 0:
                verdict = partial(loss, of_sets, known)
                found["partial"][name + (", spread" if spread else "")] = dataclasses.asdict(verdict)
    for a in scores:
        found["between scores"][a] = {b: round(float(stats.spearmanr(scores[a], scores[b])[0]), 2) for b in scores}
    return found


def paired(data: dict[str, Any], label: str, against: str) -> tuple[float, float, int]:
    """Mean difference of held-out nats over the seeds that both have, half of its 95% interval, and their number."""
    by_label = {one: {t["seed"]: t["nats"] for t in data["trials"] if _is(t, one, data)} for one in (label, against)}
    both = sorted(set(by_label[label]) & set(by_label[against]))
    gaps = np.array([by_label[label][seed] - by_label[against][seed] for seed in both])
    if len(gaps) < 2:
        return float(gaps.mean()) if len(gaps) else math.nan, math.nan, len(gaps)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return float(gaps.mean()), float(half), len(gaps)


def _is(trial: dict[str, Any], label: str, data: dict[str, Any]) -> bool:
    return bool(trial["label"] == label and trial["rate"] == data["rate"] and trial["seed"] in DECIDING_SEEDS)


def show(found: dict[str, Any], data: dict[str, Any]) -> None:
    """The verdicts as tables, the best first."""
    print(f"## {found['ground']['model']}, {found['ground']['task']}: {found['sets']} sets\n")
    print("Spearman with the loss:", {k: round(v, 2) for k, v in found["spearman with loss"].items()}, "\n")
    print("| score, summed | partial correlation | 95% | spread over blocks | 95% |\n|---|---|---|---|---|")
    verdicts = found["partial"]
    for name in sorted((n for n in verdicts if not n.endswith(", spread")), key=lambda n: verdicts[n]["correlation"]):
        cells = [name]
        for key in (name, f"{name}, spread"):
            v = verdicts.get(key)
            cells += ["-", "-"] if v is None else [f"{v['correlation']:+.2f}", f"{v['low']:+.2f} to {v['high']:+.2f}"]
        print("| " + " | ".join(cells) + " |")
    print("\n| set | seeds | adapters | parameters | kept | nats | minus LoRA on all | accuracy |")
    print("|---|---|---|---|---|---|---|---|")
    labels = {
        t["label"]: t for t in data["trials"] if t["seed"] in DIRECT_SEEDS and not t["label"].startswith("random ")
    }
    whole = _whole(data)
    for label, one in labels.items():
        mine = [t for t in data["trials"] if _is(t, label, data)]
        gap, half, count = paired(data, label, "all")
        nats, right = (sum(t[key] for t in mine) / len(mine) for key in ("nats", "accuracy"))
        print(
            f"| {label} | {count} | {len(one['set'])} | {one['params'] / 1000:.0f} k | {one['kept'] / whole:.2f}x |"
            f" {nats:.4f} | {gap:+.4f} ± {half:.4f} | {right:.3f} |"
        )
    gaps = [(a, b, *paired(data, a, b)) for a, b in DECIDING]
    values = sorted((_p_value(data, a, b), a, b, gap, half) for a, b, gap, half, count in gaps if count > 1)
    for rank, (p, a, b, gap, half) in enumerate(values):
        holm = min(1.0, max((len(values) - i) * values[i][0] for i in range(rank + 1)))
        print(f"\n{a} minus {b}: {gap:+.4f} ± {half:.4f} nats, p = {p:.3f}, {holm:.3f} by Holm")
    print()


def picture(data: dict[str, Any], path: Path) -> None:
    """Held-out loss of every set against what it keeps for backward: random sets, and by number what was compared
    directly."""
    figure, (axes, side) = pyplot.subplots(1, 2, figsize=(9, 4.5), layout="constrained", width_ratios=(3, 1))
    whole = _whole(data)
    lowest = [min(data["adapters"][i]["block"] for i in t["set"]) for t in _random(data)]
    spots = axes.scatter(
        [t["kept"] / whole for t in _random(data)], [t["nats"] for t in _random(data)], c=lowest, cmap="viridis", s=24
    )
    figure.colorbar(spots, ax=axes, label="lowest block with an adapter")
    labels = dict.fromkeys(t["label"] for t in data["trials"] if t["seed"] in DIRECT_SEEDS and t["set"])
    names: list[str] = []
    placed: list[tuple[float, float]] = []
    for number, label in enumerate((one for one in labels if not one.startswith("random ")), 1):
        mine = [t for t in data["trials"] if _is(t, label, data)]
        at = mine[0]["kept"] / whole, sum(t["nats"] for t in mine) / len(mine)
        axes.plot(*at, "^", color="black", markersize=5)
        near = sum(abs(at[0] - x) < 0.03 and abs(at[1] - y) < 0.02 for x, y in placed)
        offset = ((0, 6), (11, -3), (-11, -3), (0, -13), (11, 6), (-11, 6), (11, -13))[min(near, 6)]
        axes.annotate(str(number), at, xytext=offset, textcoords="offset points", fontsize=8, ha="center")
        placed.append(at)
        names.append(f"{number:2}  {label}")
    side.axis("off")
    side.text(0, 1, "\n".join(names), va="top", fontsize=8, linespacing=1.5, transform=side.transAxes)
    top = min(t["nats"] for t in data["trials"]) + FAR
    above = sum(t["nats"] > top for t in _random(data))
    note = f"; {above} random sets lie above" if above else ""
    axes.set(xlabel="kept for backward, over LoRA on all", ylabel=f"held-out nats{note}", ylim=(None, top))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _whole(data: dict[str, Any]) -> int:
    """What LoRA on all keeps for backward."""
    return int(next(t["kept"] for t in data["trials"] if t["label"] == "all" and t["rate"] == data["rate"]))


def _random(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [t for t in data["trials"] if t["label"].startswith("random ")]


def _p_value(data: dict[str, Any], label: str, against: str) -> float:
    gap, half, count = paired(data, label, against)
    t = gap / (half / stats.t.ppf(0.975, count - 1)) if half > 0 else math.inf
    return float(2 * stats.t.sf(abs(t), count - 1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--ground", choices=sorted(GROUNDS), required=True)
    run.add_argument("--data-dir", required=True)
    run.add_argument("--stages", default="scores,qualify,sets,direct,longer,rates")
    run.add_argument("--threads", type=int, default=1)
    judged = commands.add_parser("judge")
    judged.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.command == "judge":
        for path in sorted(p for p in args.results.glob("placement-*.json") if "judged" not in p.name):
            found = judge(path)
            data = json.loads(path.read_text())
            show(found, data)
            picture(data, path.with_suffix(".png"))
            write(path.with_name(path.name.replace("placement-", "placement-judged-")), found)
        return 0
    torch.set_num_threads(args.threads)
    Study(args.ground, args.data_dir).run(args.stages.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())

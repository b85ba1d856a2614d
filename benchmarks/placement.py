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

import torch

from adapter_path import write
from benchlib.ground import Ground, Outcome, Settings
from benchlib.signals import all_scores, in_rounds
from benchlib.verdicts import (
    DECIDING,
    DECIDING_SEEDS,
    DIRECT_SEEDS,
    GROWN,
    HALF,
    SAME_PARAMETERS,
    SAME_WORK,
    agreement,
    judge,
    picture,
    show,
    show_over_grounds,
)
from weightlora.core.budget import affordable
from weightlora.core.importance import coverage
from weightlora.core.placement import place
from weightlora.core.published import proportional_ranks
from weightlora.runs.record import collect_versions, machine

RESULTS = Path(__file__).parent / "results"
GROUNDS = {
    "smollm2-sst2": Settings(model="smollm2", task="sst2", steps=64, batch=8, judged_rows=218),
    "smollm2-sst2-float32": Settings(model="smollm2", task="sst2", steps=64, batch=8, judged_rows=218, dtype="float32"),
    "minilm-sst2": Settings(model="minilm", task="sst2", steps=150, batch=16, judged_rows=436),
    "minilm-sst2-long": Settings(model="minilm", task="sst2", steps=225, batch=16, judged_rows=436),
    "smollm2-docstrings": Settings(
        model="smollm2",
        task="docstrings",
        steps=64,
        batch=8,
        judged_rows=218,
        max_length=48,
        words="text network parallel files numbers language tests",
    ),
    "smollm2-gsm8k": Settings(
        model="smollm2", task="gsm8k", steps=64, batch=4, judged_rows=105, max_length=512, longest=112
    ),
    # For processors that have no instructions for bfloat16: nine times as fast there.
    "smollm2-gsm8k-float32": Settings(
        model="smollm2", task="gsm8k", steps=64, batch=4, judged_rows=105, max_length=512, longest=112, dtype="float32"
    ),
    "minilm-docstrings": Settings(
        model="minilm", task="docstrings", steps=150, batch=16, judged_rows=436, max_length=48
    ),
    "minilm-docstrings-long": Settings(
        model="minilm", task="docstrings", steps=300, batch=16, judged_rows=436, max_length=48
    ),
    "minilm-docstrings-longest": Settings(
        model="minilm", task="docstrings", steps=450, batch=16, judged_rows=436, max_length=48
    ),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
HEAD_RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # of an output layer that is trained whole
# In the order in which they tell the most; each is a method of the study.
STAGES = (
    "scores", "qualify", "stated", "direct", "sets", "rounds", "longer", "rates", "own", "grown", "shares", "quarter",
    "choosing", "equal", "even", "work", "pair",
)  # fmt: skip
SETS = 60
SHARES = (0.3, 0.7, 0.85)  # of what LoRA on all keeps for backward, beside half
FEW = 0.03  # of all adapters, where pruning in rounds is tried
# Compared directly: the rule that was the default, and the one that told random sets apart best by its sum.
RULES = ("credit", "weight times gradient (GoRA)")
QUARTER_RULES = ("whitened gradient", *reversed(RULES))
EQUAL_RULES = ("integrated gates", "whitened gradient")
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
        self.data_dir = data_dir
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
            if dataclasses.asdict(Settings(**old["settings"])) != asked:
                raise SystemExit(f"{self.path} has other settings: {old['settings']}; move it away")
            self.data |= old | {"settings": asked}
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
        out: Outcome
        if not head:
            out = ground.trial(indices, seed=seed, rate=rate, **more)
        else:
            out = ground.output_layer(seed, more["head_rate"]) if more else ground.readout(seed)
        one = {"label": label, "seed": seed, "rate": rate, "set": list(indices), **dataclasses.asdict(out)} | more
        self.data["trials"].append(one)
        self.save()
        print(
            f"{self.name}: {label}, seed {seed}, rate {rate}: {out.nats:.4f} nats, {out.accuracy:.4f}, {out.seconds} s",
            flush=True,
        )
        return one

    def best_rate(self, label: str, chosen: Sequence[int], more: dict[str, Any]) -> float:
        """The one with the least held-out loss over two seeds of its own."""
        first = {rate: self.trial(label, chosen, TUNE_SEEDS[0], rate, **more)["nats"] for rate in RATES}
        # What is far behind already is not tried again.
        near = [rate for rate in RATES if first[rate] < min(first.values()) + 0.1]
        second = {rate: self.trial(label, chosen, TUNE_SEEDS[1], rate, **more)["nats"] for rate in near}
        return min(near, key=lambda rate: first[rate] + second[rate])

    def run(self, stages: Sequence[str], rate: float | None = None) -> None:
        """Some of the stages, with a rate found on another task, or tuned here."""
        rate = self.best_rate("all", range(len(self.blocks)), {}) if rate is None else rate
        self.data["rate"] = rate
        for name in STAGES:
            if name in stages:
                getattr(self, f"_{name}")(rate)
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
            elif self.ground.language:
                for head_rate in HEAD_RATES:
                    self.trial(f"output layer alone, rate {head_rate}", [], seed, rate, head=True, head_rate=head_rate)
            for head_rate in (1e-3, 5e-3) if self.ground.heads else (1e-3,):
                self.trial(f"none, head rate {head_rate}", [], seed, rate, head_rate=head_rate)

    def _stated(self, rate: float) -> None:
        """The comparisons that were stated before they were run: all that a task for confirmation needs."""
        sets = {"all": list(range(len(self.blocks))), **self._halves()}
        for seed in DECIDING_SEEDS:
            for label, chosen in sets.items():
                self.trial(label, chosen, seed, rate)

    def _direct(self, rate: float) -> None:
        for seed in DIRECT_SEEDS:
            for label, chosen, more in self.direct():
                self.trial(label, chosen, seed, rate, **more)

    def _sets(self, rate: float) -> None:
        self.trial("all", range(len(self.blocks)), SET_SEED, rate)  # what the others' memory is measured by
        for number, chosen in enumerate(random_sets(self.blocks, self.kinds, SETS)):
            self.trial(f"random {number}", chosen, SET_SEED, rate)

    def _rounds(self, rate: float) -> None:
        """Whether measuring again while pruning finds better sets of very few adapters than measuring once."""
        k, rule, draw = max(1, round(len(self.blocks) * FEW)), RULES[0], random.Random(CONTROL_SEED)
        found = self.data.setdefault("in rounds", {})
        for seed in DIRECT_SEEDS:
            measured = str(SCORE_SEED + 100 * seed)
            if measured not in found:
                found[measured] = in_rounds(self.ground, int(measured), rate, steps=self.settings.steps // 2, k=k)
                self.save()
            once, last = found[measured]
            self.trial(f"K={k}, {rule}", once, seed, rate)
            self.trial(f"K={k}, {rule}, in rounds", last, seed, rate)
            self.trial(f"K={k}, matched chance", self._matched(once, draw), seed, rate)

    def _longer(self, rate: float) -> None:
        """Whether training was long enough for LoRA on all, and what half of the memory costs with more of it."""
        chosen, steps = self._halves()[HALF], self.settings.steps * 3 // 2
        raised = self._raised(chosen)
        for seed in DIRECT_SEEDS:
            self.trial("all, half as many steps more", range(len(self.blocks)), seed, rate, steps=steps)
        for seed in DIRECT_SEEDS:
            self.trial(f"{GROWN[0]}, half as many steps more", chosen, seed, rate, steps=steps, **raised)

    def _rates(self, rate: float) -> None:
        """Whether a smaller set wants another rate than all."""
        self.best_rate(HALF, self._halves()[HALF], {})

    def _quarter(self, rate: float) -> None:
        """A quarter of the adapters by scores that told random sets apart, and draws that change with the seed."""
        n = len(self.blocks)
        best = {rule: self._best(rule, n // 4) for rule in QUARTER_RULES}
        for seed in DECIDING_SEEDS:
            draw = random.Random(CONTROL_SEED + seed)
            sets = {f"quarter, {rule}": chosen for rule, chosen in best.items()}
            sets["quarter, matched chance"] = self._matched(best[QUARTER_RULES[0]], draw)
            sets["quarter, chance"] = sorted(draw.sample(range(n), n // 4))
            sets[f"quarter, matched chance of {RULES[0]}"] = self._matched(best[RULES[0]], draw)
            for label, chosen in sets.items():
                self.trial(label, chosen, seed, rate)

    def _equal(self, rate: float) -> None:
        """What other scores choose with the parameters of credit's quarter, and the half by integrated gates."""
        n, scores, costs = len(self.blocks), self.data["scores"][str(SCORE_SEED)], self.ground.placement_costs()
        quarter, size, room = self._quarter_of_credit()
        sets = {f"quarter, {RULES[0]}": quarter}
        sets |= {f"{SAME_PARAMETERS}, {rule}": affordable(_ranked(scores[rule]), size, room) for rule in EQUAL_RULES}
        half = costs.total(range(n)) // 2
        sets[f"half kept, {EQUAL_RULES[0]}"] = list(place(scores[EQUAL_RULES[0]], costs, half).chosen)
        for seed in DECIDING_SEEDS:
            draw = random.Random(CONTROL_SEED + seed)
            sets[f"{SAME_PARAMETERS}, chance"] = affordable(_ranked([draw.random() for _ in range(n)]), size, room)
            for label, chosen in sets.items():
                self.trial(label, chosen, seed, rate)

    def _even(self, rate: float) -> None:
        """What needs no score: with the parameters of credit's quarter, the widest adapter of each block, then of each
        once more."""
        _, size, room = self._quarter_of_credit()
        fewer = (coverage(size, self.blocks, k) for k in range(len(size), 0, -1))
        even = next(chosen for chosen in fewer if sum(size[i] for i in chosen) <= room)
        for seed in DECIDING_SEEDS:
            self.trial(f"{SAME_PARAMETERS}, even", even, seed, rate)

    def _pair(self, rate: float) -> None:
        """LoRA on all, and the half by credit with ranks raised, at LoRA's rate."""
        chosen = self._halves()[HALF]
        for seed in DECIDING_SEEDS:
            self.trial("all", range(len(self.blocks)), seed, rate)
            self.trial(GROWN[0], chosen, seed, rate, **self._raised(chosen))

    def _work(self, rate: float) -> None:
        """The same, and the half once more, trained for the operations of LoRA on all."""
        self._pair(rate)
        every, chosen = list(range(len(self.blocks))), self._halves()[HALF]
        raised = self._raised(chosen)
        counts = {"all": self.ground.operations(every), GROWN[0]: self.ground.operations(chosen, **raised)}
        self.data["operations"] = counts
        steps = self.settings.steps * counts["all"] // counts[GROWN[0]]
        for seed in DECIDING_SEEDS:
            self.trial(SAME_WORK[0], chosen, seed, rate, steps=steps, **raised)

    def _quarter_of_credit(self) -> tuple[list[int], list[int], int]:
        """A quarter of the adapters by credit, the parameters of each of all, and those of the quarter."""
        size = [int(one) for one in self.data["scores"][str(SCORE_SEED)]["parameters"]]
        quarter = self._best(RULES[0], len(size) // 4)
        return quarter, size, sum(size[i] for i in quarter)

    def _choosing(self, rate: float) -> None:
        """Whether held-out training rows would have chosen the same rate of LoRA on all."""
        self.ground, own = Ground(self.settings, self.data_dir, choosing=True), self.ground
        self.data["rate by training rows"] = self.best_rate("all, judged on training rows", range(len(self.blocks)), {})
        self.ground = own

    def _own(self, rate: float) -> None:
        """The stated comparisons again, with the halves at the best rate of the half by credit."""
        halves = self._halves()
        own = self.best_rate(HALF, halves[HALF], {})
        self.data.setdefault("own rates", {}).update(dict.fromkeys(halves, own))
        for seed in DECIDING_SEEDS:
            for label, chosen in halves.items():
                self.trial(label, chosen, seed, own)

    def _grown(self, rate: float) -> None:
        """The half by credit with ranks raised to the parameters of LoRA on all, at its own best rate."""
        chosen = self._halves()[HALF]
        more = self._raised(chosen)
        own = self.best_rate(GROWN[0], chosen, more)
        self.data.setdefault("own rates", {})[GROWN[0]] = own
        for seed in DECIDING_SEEDS:
            self.trial(GROWN[0], chosen, seed, own, **more)

    def _shares(self, rate: float) -> None:
        """What other shares of the memory than half cost, with ranks raised likewise, at the rate of LoRA on all."""
        scores, costs = self.data["scores"][str(SCORE_SEED)], self.ground.placement_costs()
        whole = costs.total(range(len(self.blocks)))
        for seed in DECIDING_SEEDS:
            for share in SHARES:
                chosen = list(place(scores[RULES[0]], costs, int(share * whole)).chosen)
                self.trial(f"{share} kept, {RULES[0]}, grown", chosen, seed, rate, **self._raised(chosen))

    def _raised(self, chosen: Sequence[int]) -> dict[str, Any]:
        """One rank for all that are chosen, with which they have the parameters of LoRA on all."""
        size = self.data["scores"][str(SCORE_SEED)]["parameters"]
        return {"ranks": int(self.settings.rank * sum(size) / sum(size[i] for i in chosen))}

    def _halves(self) -> dict[str, list[int]]:
        """The sets of the stated comparisons beside LoRA on all."""
        named = {label for pair in DECIDING for label in pair} - {"all"}
        return {label: chosen for label, chosen, _ in self.direct() if label in named}

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
            best = self._best(rule, k)
            first = first or best
            rows += [(f"K={k}, {rule}", best, {})]
        spread = coverage(scores[RULES[0]], self.blocks, k)
        rows += [(f"K={k}, {RULES[0]}, spread", spread, {})]
        rows += [(f"K={k}, matched chance", self._matched(first, draw), {})]
        rows += [(f"K={k}, deepest", list(range(n - k, n)), {}), ("all, rank 1", list(range(n)), {"ranks": 1})]
        wide = [i for i, name in enumerate(self.ground.names) if name.endswith(("up_proj", "intermediate.dense"))]
        rows += [("feed-forward in", wide, {})]
        shapes = [(layer.in_features, layer.out_features) for layer in self.ground.linears]
        ranks = proportional_ranks(scores[RULES[1]], shapes, [self.settings.rank] * n)
        rows += [("all, ranks by GoRA", list(range(n)), {"ranks": ranks})]
        return rows

    def _above(self, block: int) -> list[int]:
        return [i for i, b in enumerate(self.blocks) if b >= block]

    def _best(self, rule: str, k: int) -> list[int]:
        """The k adapters that a score puts highest, in model order."""
        return sorted(_ranked(self.data["scores"][str(SCORE_SEED)][rule])[:k])

    def _widest_above(self, block: int) -> list[int]:
        """The adapter with the most parameters in each block from `block` up; of equal ones the first."""
        size = self.data["scores"][str(SCORE_SEED)]["parameters"]
        of_block = {b: [i for i in self._above(block) if self.blocks[i] == b] for b in self.blocks if b >= block}
        return sorted(max(members, key=lambda i: size[i]) for members in of_block.values())

    def _matched(self, chosen: Sequence[int], draw: random.Random) -> list[int]:
        """As many of each kind and size, from anywhere: the same parameters."""
        size = self.data["scores"][str(SCORE_SEED)]["parameters"]
        alike = [(kind, size[i]) for i, kind in enumerate(self.kinds)]  # several kinds may end in one word: dense
        found: list[int] = []
        for one in sorted({alike[i] for i in chosen}):
            same = [i for i, other in enumerate(alike) if other == one]
            found += draw.sample(same, sum(alike[i] == one for i in chosen))
        return sorted(found)


def _ranked(scores: Sequence[float]) -> list[int]:
    """Indices, the highest score first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def judge_all(results: Path) -> None:
    """Print the tables of all grounds, and write their verdicts and pictures beside them."""
    verdicts, grounds = {}, {}
    for path in sorted(p for p in results.glob("placement-*.json") if "judged" not in p.name):
        name, data = path.stem.removeprefix("placement-"), json.loads(path.read_text())
        if not data["scores"]:
            continue  # where rates alone were tried
        verdicts[name], grounds[name] = judge(path), data
        show(verdicts[name], data)
        if verdicts[name]["sets"]:
            picture(data, path.with_suffix(".png"))
        write(results / f"placement-judged-{name}.json", verdicts[name])
    show_over_grounds(list(grounds.values()))
    if {"smollm2-sst2", "minilm-sst2"} <= verdicts.keys():
        agreement(verdicts["smollm2-sst2"], verdicts["minilm-sst2"], results / "placement-scores.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--ground", choices=sorted(GROUNDS), required=True)
    run.add_argument("--data-dir", required=True)
    run.add_argument("--stages", default=",".join(STAGES))
    run.add_argument("--rate", type=float, help="found on another task of the same model; default: tuned here")
    run.add_argument("--threads", type=int, default=1)
    judging = commands.add_parser("judge")
    judging.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.command == "judge":
        judge_all(args.results)
        return 0
    if unknown := set(args.stages.split(",")) - set(STAGES):
        parser.error(f"stage {sorted(unknown)[0]!r} is unknown; use some of {','.join(STAGES)}")
    torch.set_num_threads(args.threads)
    Study(args.ground, args.data_dir).run(args.stages.split(","), args.rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())

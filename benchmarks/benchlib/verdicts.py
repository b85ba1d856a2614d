"""What a ground's results say: scores against random sets, choices against each other, as tables and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from benchlib.judging import load, partial, value

matplotlib.use("agg")
from matplotlib import pyplot

# Stated before they were run, and corrected by Holm's procedure; all other comparisons are exploration.
HALF = "half kept, credit"
DECIDING = ((HALF, "half kept, all upper"), (HALF, "half kept, chance"), (HALF, "all"))
# Stated later than those, before it was run: whether ranks raised to LoRA's parameters close what is left.
GROWN = (f"{HALF}, grown", "all")
# Stated when half of the memory was known to cost something: what it costs where as many operations are spent.
SAME_WORK = (f"{GROWN[0]}, operations of all", "all")
# Stated when random sets had been judged by scores: a quarter of the adapters by the one that told them apart best.
QUARTER = tuple(("quarter, whitened gradient", f"quarter, {other}") for other in ("matched chance", "chance", "credit"))
# Stated when the quarter was known: other scores with as many parameters as credit's quarter has.
SAME_PARAMETERS = "parameters of credit's quarter"
EQUAL = (
    (f"{SAME_PARAMETERS}, integrated gates", "quarter, credit"),
    (f"{SAME_PARAMETERS}, whitened gradient", "quarter, credit"),
    (f"{SAME_PARAMETERS}, integrated gates", f"{SAME_PARAMETERS}, chance"),
    (f"{SAME_PARAMETERS}, even", f"{SAME_PARAMETERS}, chance"),  # on SmolLM2's GSM8K, in place of the second
)
DIRECT_SEEDS = (1, 2, 3)
DECIDING_SEEDS = (*DIRECT_SEEDS, 4, 5)  # the last two were added when the first three had been looked at
LEVEL = 0.05  # of the stated comparisons together
LOST = 0.5  # nats above the median of random sets
FAR = 0.3  # nats above the best: a run that lost its way


def judge(path: Path, draws: int = 2000) -> dict[str, Any]:
    """Every score against the random sets of one ground, where it has any, and against each other.

    ``draws``: of the bootstrap for each interval.
    """
    data = json.loads(path.read_text())
    sets, scores, adapters = load(str(path))
    blocks = [int(a["block"]) for a in adapters]
    scores["chance"] = [random.Random(i).random() for i in range(len(adapters))]
    found: dict[str, Any] = {"ground": data["settings"], "sets": len(sets), "rate": data.get("rate")}
    found |= _against_sets(sets, scores, blocks, draws) if sets else {}
    found["between scores"] = {
        a: {b: round(float(stats.spearmanr(scores[a], scores[b])[0]), 2) for b in scores} for a in scores
    }
    return found


def _against_sets(
    sets: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[float]], blocks: Sequence[int], draws: int
) -> dict[str, Any]:
    """By partial rank correlation: given parameters, count and lowest block, and given evenness over blocks too."""
    loss = np.array([one["nats"] for one in sets], dtype=float)
    known = np.array(
        [[one["params"], len(one["set"]), min(blocks[i] for i in one["set"])] for one in sets], dtype=float
    )
    names = ("parameters", "count", "lowest block")
    even = [value(scores["parameters"], one["set"], blocks, spread=True) for one in sets]
    more = np.column_stack([known, even])
    verdicts: dict[str, dict[str, Any]] = {"partial": {}, "beyond evenness": {}}
    for name, values in scores.items():
        for spread in (False, True):
            of_sets = np.array([value(values, one["set"], blocks, spread=spread) for one in sets])
            if np.ptp(of_sets) > 0:
                for key, facts in (("partial", known), ("beyond evenness", more)):
                    verdicts[key][name + (", spread" if spread else "")] = dataclasses.asdict(
                        partial(loss, of_sets, facts, draws=draws)
                    )
    alone = {n: float(stats.spearmanr(known[:, i], loss)[0]) for i, n in enumerate(names)}
    return {"spearman with loss": alone, **verdicts}


def paired(data: dict[str, Any], label: str, against: str, *, own: bool = False) -> tuple[float, float, int]:
    """Mean difference of held-out nats over the seeds that both have, half of its 95% interval, and their number.

    Args:
        data: of a ground.
        label: of a set.
        against: of another.
        own: sets at rates of their own, where they have any, in place of that of LoRA on all.
    """
    by_label = {
        one: {t["seed"]: t["nats"] for t in data["trials"] if _is(t, one, data, own)} for one in (label, against)
    }
    both = sorted(set(by_label[label]) & set(by_label[against]))
    gaps = np.array([by_label[label][seed] - by_label[against][seed] for seed in both])
    if len(gaps) < 2:
        return float(gaps.mean()) if len(gaps) else math.nan, math.nan, len(gaps)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return float(gaps.mean()), float(half), len(gaps)


def noise(data: Mapping[str, Any]) -> tuple[float, float]:
    """Standard deviations of held-out nats: of random sets, and of seeds, pooled over sets with three or more.

    Random sets more than :data:`LOST` above the median are left out. Not a number: no set has three seeds yet.
    """
    nats = [t["nats"] for t in _random(data)]
    of_sets = float(np.std([one for one in nats if one < np.median(nats) + LOST], ddof=1))
    by_set: dict[tuple[str, ...], dict[int, float]] = {}
    for t in data["trials"]:
        if t["set"] and t["seed"] in DECIDING_SEEDS:
            same = by_set.setdefault(tuple(str(t.get(key)) for key in ("set", "rate", "ranks", "steps")), {})
            same[t["seed"]] = t["nats"]  # one set may have two labels
    several = [list(one.values()) for one in by_set.values() if len(one) >= 3]
    squares = sum(float(np.var(one, ddof=1)) * (len(one) - 1) for one in several)
    return of_sets, math.sqrt(squares / sum(len(one) - 1 for one in several)) if several else math.nan


def _is(trial: dict[str, Any], label: str, data: dict[str, Any], own: bool = False) -> bool:
    rates = data.get("own rates", {}) if own or label == GROWN[0] else {}
    rate = rates.get(label, data["rate"])
    return bool(trial["label"] == label and trial["rate"] == rate and trial["seed"] in DECIDING_SEEDS)


def show(found: dict[str, Any], data: dict[str, Any]) -> None:
    """The verdicts as tables, the best first."""
    print(f"## {found['ground']['model']}, {found['ground']['task']}: {found['sets']} sets\n")
    if found["sets"]:
        _show_scores(found, data)
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
    _show_differences([(f"{a} minus {b}", *paired(data, a, b)) for a, b in DECIDING])
    for stated in (QUARTER, EQUAL):
        if stated[0][0] in labels:
            _show_differences([(f"{a} minus {b}", *paired(data, a, b)) for a, b in stated])
    rates = data.get("own rates", {})
    if rates.get(HALF, data["rate"]) != data["rate"]:
        print(f"\nAgain, with the halves at their own best rate, {rates[HALF]}:")
        again = [(a, b) for a, b in DECIDING if {a, b} <= {"all", *rates}]
        _show_differences([(f"{a} minus {b}", *paired(data, a, b, own=True)) for a, b in again])
    print()


def show_over_grounds(grounds: Sequence[dict[str, Any]]) -> None:
    """Comparisons of which each ground has one, corrected over grounds."""
    grown = [data for data in grounds if GROWN[0] in data.get("own rates", {})]
    _show_over("Ranks raised to the parameters of LoRA on all, minus LoRA on all", GROWN, grown, own=True)
    worked = [data for data in grounds if any(t["label"] == SAME_WORK[0] for t in data["trials"])]
    _show_over("The same for the operations of LoRA on all, minus LoRA on all", SAME_WORK, worked)


def _show_over(title: str, pair: tuple[str, str], grounds: Sequence[dict[str, Any]], *, own: bool = False) -> None:
    print(f"## {title}")
    settings = [data["settings"] for data in grounds]
    labels = [f"{one['model']}, {one['task']}, {one['steps']} steps" for one in settings]
    _show_differences([(name, *paired(data, *pair, own=own)) for name, data in zip(labels, grounds, strict=True)])


def _show_differences(gaps: Sequence[tuple[str, float, float, int]]) -> None:
    """What was stated before, as a table: the most certain first, in bold what is decided."""
    print("\n| stated before | difference, nats | p | by Holm |\n|---|---|---|---|")
    values = sorted((_p_value(gap, half, count), name, gap, half) for name, gap, half, count in gaps if count > 1)
    for rank, (p, name, gap, half) in enumerate(values):
        holm = min(1.0, max((len(values) - i) * values[i][0] for i in range(rank + 1)))
        difference = f"{gap:+.4f} ± {half:.4f}"
        print(f"| {name} | {f'**{difference}**' if holm < LEVEL else difference} | {_said(p)} | {_said(holm)} |")


def _said(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def _show_scores(found: dict[str, Any], data: dict[str, Any]) -> None:
    of_sets, of_seeds = noise(data)
    print(f"Standard deviation of sets {of_sets:.3f}, of seeds {of_seeds:.3f}: {of_seeds**2 / of_sets**2:.0%} is noise")
    print("Spearman with the loss:", {k: round(v, 2) for k, v in found["spearman with loss"].items()}, "\n")
    print("| score, summed | partial correlation | spread over blocks | summed, beyond evenness |\n|---|---|---|---|")
    verdicts, beyond = found["partial"], found["beyond evenness"]
    for name in sorted((n for n in verdicts if not n.endswith(", spread")), key=lambda n: verdicts[n]["correlation"]):
        three = (verdicts[name], verdicts.get(f"{name}, spread"), beyond[name])
        print(f"| {name} | {' | '.join('-' if one is None else said(one) for one in three)} |")


def said(verdict: Mapping[str, float]) -> str:
    """A correlation with its interval, as in the tables."""
    return f"{verdict['correlation']:+.2f} ({verdict['low']:+.2f} to {verdict['high']:+.2f})"


def picture(data: dict[str, Any], path: Path) -> None:
    """Held-out loss of every set against what it keeps for backward: random sets, and by number what was compared
    directly."""
    figure, (axes, side) = pyplot.subplots(1, 2, figsize=(10.5, 4.5), layout="constrained", width_ratios=(3, 1.6))
    whole = _whole(data)
    lowest = [min(data["adapters"][i]["block"] for i in t["set"]) for t in _random(data)]
    spots = axes.scatter(
        [t["kept"] / whole for t in _random(data)], [t["nats"] for t in _random(data)], c=lowest, cmap="viridis", s=24
    )
    figure.colorbar(spots, ax=axes, label="lowest block with an adapter")
    # Whatever trained longer is compared with nothing here.
    direct = [t for t in data["trials"] if t["seed"] in DIRECT_SEEDS and t["set"] and "steps" not in t]
    labels = dict.fromkeys(t["label"] for t in direct)
    points = []
    for label in (one for one in labels if not one.startswith("random ")):
        mine = [t for t in data["trials"] if _is(t, label, data)]
        kept, nats = (sum(t[key] for t in mine) / len(mine) for key in ("kept", "nats"))
        points.append((label, kept / whole, nats))
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "^", color="black", markersize=5)
    side.axis("off")
    names = [f"{number:2}  {label}" for number, (label, _, _) in enumerate(points, 1)]
    side.text(0, 1, "\n".join(names), va="top", fontsize=8, linespacing=1.5, transform=side.transAxes)
    top = min(t["nats"] for t in direct) + FAR
    above = sum(t["nats"] > top for t in _random(data))
    note = f"; {above} random sets lie above" if above else ""
    axes.set(xlabel="kept for backward, over LoRA on all", ylabel=f"held-out nats{note}", ylim=(None, top))
    figure.canvas.draw()  # from here on it is known where points lie
    drawn = [(x, y) for _, x, y in points] + [(t["kept"] / whole, t["nats"]) for t in _random(data)]
    taken = [tuple(spot) for spot in axes.transData.transform(drawn) * 72 / figure.dpi]
    for number, (x, y) in enumerate(taken[: len(points)], 1):
        offset = _beside((x, y), taken)
        taken.append((x + offset[0], y + offset[1]))
        axes.annotate(
            str(number), points[number - 1][1:], xytext=offset, textcoords="offset points", fontsize=8, ha="center",
            va="center",
        )  # fmt: skip
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _beside(at: tuple[float, float], taken: Sequence[tuple[float, ...]]) -> tuple[float, float]:
    """Where a number goes, in points from its mark: the nearest place with nothing near, or the emptiest."""
    around = [
        (radius * math.cos(angle * math.pi / 4), radius * math.sin(angle * math.pi / 4))
        for radius in (9, 13, 17, 21)
        for angle in (2, 0, 4, 6, 1, 3, 7, 5)
    ]
    return max(around, key=lambda o: min(9.0, *(math.dist((at[0] + o[0], at[1] + o[1]), spot) for spot in taken)))


def agreement(below: dict[str, Any], above: dict[str, Any], path: Path) -> None:
    """How scores rank the adapters alike (Spearman): one ground below the diagonal, another above it."""
    names = [name for name in below["between scores"] if name in above["between scores"]]
    size = range(len(names))
    cells = np.array([[(below if i > j else above)["between scores"][names[i]][names[j]] for j in size] for i in size])
    figure, axes = pyplot.subplots(figsize=(9, 7.5), layout="constrained")
    axes.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1)
    for i in size:
        for j in size:
            said = "" if i == j else f"{cells[i, j]:.2f}".replace("0.", ".").replace("-.00", ".00")
            axes.text(
                j, i, said, ha="center", va="center", fontsize=7, color="white" if abs(cells[i, j]) > 0.7 else "black"
            )
    axes.set_xticks(size, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(size, names, fontsize=8)
    lower, upper = (f"{one['ground']['model']}, {one['ground']['task']}" for one in (below, above))
    axes.set_title(f"below the diagonal: {lower}; above it: {upper}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _whole(data: dict[str, Any]) -> int:
    """What LoRA on all keeps for backward."""
    return int(next(t["kept"] for t in data["trials"] if t["label"] == "all" and t["rate"] == data["rate"]))


def _random(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [t for t in data["trials"] if t["label"].startswith("random ")]


def _p_value(gap: float, half: float, count: int) -> float:
    t = gap / (half / stats.t.ppf(0.975, count - 1)) if half > 0 else math.inf
    return float(2 * stats.t.sf(abs(t), count - 1))

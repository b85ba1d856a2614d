"""The pictures of one run: gates, scores, losses, metric, and what each phase cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from weightlora.report.layout import layout
from weightlora.report.picture import (
    LARGEST,
    WIDTH,
    Axis,
    Path,
    Picture,
    Point,
    Text,
    box,
    dot,
    fitted,
    frame,
    line,
    thin,
)
from weightlora.report.runfiles import Log
from weightlora.report.tables import PHASE_NUMBERS
from weightlora.report.units import BYTES, FLOPS, Scale, Unit, human, ratio
from weightlora.runs.record import EVAL_LOSS, Record

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 206
HEIGHT = BOTTOM + 36
NAME_LETTER = 6.0  # names of modules are full of narrow letters
NAMED = 6  # paths with their names beside them
NAME_ROOM = 128


def omega_picture(record: Record, log: Log, points: int) -> Picture | None:
    """Every adapter's gate through warm-up, the survivors above the rest; None where no gates were logged.

    Args:
        record: says what each gate was when the selection was made.
        log: holds ``omega/<adapter>``.
        points: how many points all paths together may have.
    """
    curves = _omega_curves(record, log)
    if not any(len(curve) > 1 for curve in curves.values()):
        return None
    kept = {entry.name for entry in record.kept} if len(record.kept) < record.n_adapters else set()
    last = max(curve[-1][0] for curve in curves.values() if curve)
    everything = [value for curve in curves.values() for _, value in curve]
    named = sorted(kept, key=lambda name: -curves[name][-1][1] if curves.get(name) else 0.0)[:NAMED]
    right = WIDTH - (NAME_ROOM if named else RIGHT)
    across = Axis(low=min(curve[0][0] for curve in curves.values() if curve), high=last, start=LEFT, end=right)
    up = Axis.around(everything, BOTTOM, TOP)
    paths, texts = frame(across, up, across_name="optimizer step", up_name="gate ω")
    each = max(4, points // max(1, len(curves)))
    digits = 1 if each > 50 else 0  # whole pixels, where there are many paths of few points
    outlines = {
        name: line([(across.at(x), up.at(y)) for x, y in _evenly(curve, each)], digits=digits)
        for name, curve in curves.items()
    }
    rest = "".join(outline for name, outline in outlines.items() if name not in kept)
    if rest:
        paths.append(Path(d=rest, look="rest" if kept else "kept"))
    short = {place.adapter.name: place.short for place in layout(record.adapters)}
    for name in (name for name in outlines if name in kept):
        words = f"{short.get(name, name)}: ω {curves[name][-1][1]:.4g} at step {curves[name][-1][0]:g}"
        paths.append(Path(d=outlines[name], look="kept", title=words))
    ends = _apart([up.at(curves[name][-1][1]) for name in named])
    for name, y in zip(named, ends, strict=True):
        words = _brief(short.get(name, name), NAME_ROOM - 8)
        texts.append(Text(x=right + 6, y=y + 4, words=words, look="start kept-name"))
    if record.seam_step is not None and record.seam_step <= last:
        paths.append(_seam(across.at(record.seam_step)))
    more = f"; the {NAMED} highest are named" if len(kept) > NAMED else ""
    return Picture(
        name="omega",
        title="Gates through warm-up",
        about=f"The gate of each of {len(curves)} adapters against the optimizer step{more}",
        height=HEIGHT,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(("kept", "kept"), ("rest", "disconnected"), ("seam", "seam")) if kept else (("kept", "adapter"),),
    )


def _omega_curves(record: Record, log: Log) -> dict[str, list[Point]]:
    """The logged gates by adapter, in the record's order where it has one; the selection's value at the end."""
    names = [adapter.name for adapter in record.adapters] or sorted(
        {key[6:] for entry in log for key in entry if key.startswith("omega/")} - {"alive", "max", "min"}
    )
    curves = {name: [(e["step"], e[f"omega/{name}"]) for e in log if f"omega/{name}" in e] for name in names}
    seam = record.seam_step
    for adapter in record.adapters:
        curve = curves[adapter.name]
        if seam is not None and curve and curve[-1][0] < seam and math.isfinite(adapter.omega):
            curve.append((seam, adapter.omega))
    return {name: curve for name, curve in curves.items() if curve}


def _evenly(curve: Sequence[Point], most: int) -> Sequence[Point]:
    """At most ``most`` points, the first and the last among them."""
    if len(curve) <= most:
        return curve
    return [curve[round(index * (len(curve) - 1) / (most - 1))] for index in range(most)]


def _apart(places: Sequence[float], gap: float = 12) -> list[float]:
    """Places from top to bottom, moved down (then up, at the foot) until names there do not overlap.

    >>> _apart([100, 101, 103])
    [100, 112, 124]
    """
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    over = max(0.0, moved[-1] - BOTTOM) if moved else 0.0
    for index in range(len(moved) - 1, -1, -1):
        limit = BOTTOM if index == len(moved) - 1 else moved[index + 1] - gap
        moved[index] = min(moved[index], limit) if over else moved[index]
    return moved


def _brief(short: str, room: float) -> str:
    """A short name cut in its middle, so that its layer and what it adapts both stay.

    >>> _brief("10.attention.output.dense", 100)
    '10…output.dense'
    """
    most = int(room / NAME_LETTER)
    if len(short) <= most:
        return short
    head = re.match(r"[^\d]*\d*", short.partition(".")[0] if short[0].isdecimal() else short)
    start = (head[0] if head else "")[: most // 2]
    tail = short[len(start) - most + 1 :].lstrip(".")
    whole = tail.partition(".")[2]  # without the half of a word, where enough is left
    return f"{start}…{whole if '.' in whole.strip('.') else tail}"


def score_picture(record: Record) -> Picture | None:
    """The scores that the method ranked the adapters by, from best to worst; None where it ranked nothing."""
    places = layout(record.adapters)
    ranked = [
        (place.adapter.score, place.adapter.kept, place.short)
        for place in places
        if place.adapter.score is not None and math.isfinite(place.adapter.score)
    ]
    if len({score for score, _, _ in ranked}) < 2:
        return None
    ranked.sort(key=lambda item: -item[0])
    across = Axis(low=0.5, high=len(ranked) + 0.5, start=LEFT, end=WIDTH - RIGHT)
    up = Axis.around([score for score, _, _ in ranked], BOTTOM, TOP)
    paths, texts = frame(across, up, across_name="adapters, best first", up_name="score")
    size = "dot" if len(ranked) <= 80 else "dot small"
    spots = [(dot(across.at(rank), up.at(score)), kept, f"{short}: {score:.4g}")
             for rank, (score, kept, short) in enumerate(ranked, start=1)]  # fmt: skip
    rest = "".join(outline for outline, kept, _ in spots if not kept)
    paths += [Path(d=rest, look=f"{size} rest")] if rest else []
    paths += [Path(d=outline, look=f"{size} kept", title=words) for outline, kept, words in spots if kept]
    return Picture(
        name="scores",
        title="Scores at the selection",
        about=f"The scores of {len(ranked)} adapters from best to worst; those kept stand out",
        height=HEIGHT,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(("dot kept", "kept"), ("dot rest", "disconnected")),
    )


def frontier_picture(record: Record) -> Picture | None:
    """What the best k adapters hold of the total score, against what a step with them costs; None without scores."""
    points = record.frontier
    if len(points) < 2:
        return None
    curves: list[tuple[str, str, Scale, list[tuple[int, float, int]]]] = [
        ("second", "kept for backward", BYTES, [(p.k, p.share, p.kept_activation_bytes) for p in points]),
        ("kept", "operations of a step", FLOPS, [(p.k, p.share, p.flops_per_step) for p in points if p.flops_per_step]),
    ]
    across = Axis(low=0, high=1, start=LEFT, end=WIDTH - RIGHT)
    up = Axis(low=0, high=1, start=BOTTOM, end=TOP)
    paths, texts = frame(
        across, up, across_name="cost, over that of all adapters", up_name="share of the score", whole=False
    )
    drawn = [curve for curve in curves if curve[3]]
    for look, name, scale, costs in drawn:
        whole = max(1, *(cost for _, _, cost in costs))
        places = [(across.at(cost / whole), up.at(share)) for _, share, cost in costs]
        paths.append(Path(d=line(places), look=look))
        for (x, y), (k, share, cost) in zip(places, costs, strict=True):
            words = f"the best {k}: {share:.0%} of the score, {name}: {human(cost, scale)}"
            paths.append(Path(d=dot(x, y), look=f"dot {look}", title=words))
        if look == "second":
            labelled = list(zip(places, costs, strict=True))[:: max(1, len(places) // 6)]
            texts += [
                Text(x=min(x + 5, WIDTH - RIGHT - 26), y=y + 12, words=f"K={k}") for (x, y), (k, _, _) in labelled
            ]
    return Picture(
        name="frontier",
        title="Share of the score against cost",
        about="For several K, the share of the total score that the best K adapters hold, against what a step costs",
        height=HEIGHT,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=tuple((look, name) for look, name, _, _ in drawn),
    )


def loss_picture(record: Record, log: Log, points: int) -> Picture | None:
    """Training loss, and validation loss where it was taken; None without a log of at least two losses."""
    training = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    if len(training) < 2:
        return None
    curves = [("kept", "training", thin(training, points), False), ("second", "validation", validation, True)]
    return _curves(record, "loss", "Loss", "loss", curves)


def metric_picture(record: Record, log: Log) -> Picture | None:
    """The headline metric on the validation rows, its final value last; None unless it was taken at least twice."""
    logged = record.metric if record.metric == EVAL_LOSS else f"eval_{record.metric}"
    taken = [(entry["step"], entry[logged]) for entry in log if logged in entry]
    score = record.score
    if (
        score is not None
        and math.isfinite(score)
        and record.max_steps
        and (not taken or taken[-1][0] < record.max_steps)
    ):
        taken.append((float(min(record.max_steps, LARGEST)), score))
    if len(taken) < 2:
        return None
    return _curves(record, "metric", "Validation metric", record.metric, [("kept", record.metric, taken, True)])


def _curves(
    record: Record, name: str, title: str, unit: str, curves: Sequence[tuple[str, str, Sequence[Point], bool]]
) -> Picture:
    """Curves against the optimizer step, with the seam marked. A curve: look, name, points, whether to dot them."""
    curves = [curve for curve in curves if curve[2]]
    steps = [x for curve in curves for x, _ in curve[2]]
    last = max([*steps, (record.max_steps or 0) if record.status == "ok" else 0, 1])
    across = Axis(low=0, high=min(last, LARGEST), start=LEFT, end=WIDTH - RIGHT)
    up = Axis.around([y for curve in curves for _, y in curve[2]], BOTTOM, TOP)
    paths, texts = frame(across, up, across_name="optimizer step", up_name=fitted(unit, 200))
    seam = record.seam_step
    if seam:
        at = across.at(seam)
        paths.insert(0, Path(d=box(LEFT, TOP, at - LEFT, BOTTOM - TOP), look="warmup"))
        paths.append(_seam(at))
        side = "end" if at > WIDTH / 2 else "start"
        texts.append(
            Text(
                x=at + (4 if side == "start" else -4), y=TOP + 10, words=f"seam, step {seam}", look=f"{side} seam-name"
            )
        )
    for look, words, points, dotted in curves:
        places = [(across.at(x), up.at(y)) for x, y in points]
        paths.append(Path(d=line(places), look=look, title=words))
        if dotted:
            paths.append(Path(d="".join(dot(x, y) for x, y in places), look=f"dot {look}"))
    keys = [(look, words) for look, words, _, _ in curves] if len(curves) > 1 else []
    return Picture(
        name=name,
        title=title,
        about=f"{title} against the optimizer step" + (f", with the seam at step {seam}" if seam else ""),
        height=HEIGHT,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(*keys, *((("warmup", "warm-up, all adapters train"),) if seam else ())),
    )


def _seam(x: float) -> Path:
    return Path(d=line([(x, TOP), (x, BOTTOM)]), look="seam")


def cost_picture(record: Record) -> Picture | None:
    """What a step cost before and after the seam, each pair of bars to its own scale; None without two phases."""
    if len(record.phases) < 2:
        return None
    before, after = record.phases[0], record.phases[-1]
    paths, texts, y = [], [], 8.0
    room = WIDTH - 70
    for name, key, scale in PHASE_NUMBERS:
        values = [value for value in (getattr(before, key), getattr(after, key)) if value is not None]
        if len(values) < 2 or max(values) <= 0:
            continue
        unit = Unit.fit(values, scale)
        texts.append(Text(x=0, y=y + 8, words=name))
        texts.append(Text(x=WIDTH, y=y + 8, words=ratio(*values), look="end strong"))
        for index, (value, look) in enumerate(zip(values, ("before", "after"), strict=True)):
            length = room * value / max(values)
            top = y + 14 + 13 * index
            paths.append(Path(d=box(0, top, max(length, 0.5), 9), look=f"bar {look}", title=f"{look} the seam: {name}"))
            texts.append(Text(x=length + 5, y=top + 8.5, words=unit.text(value)))
        y += 51
    if not paths:
        return None
    return Picture(
        name="costs",
        title="Before and after the seam",
        about="Pairs of bars: what a step cost before and after the seam",
        height=y - 4,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(("bar before", before.name), ("bar after", after.name)),
    )

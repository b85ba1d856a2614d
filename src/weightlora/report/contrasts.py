"""The pictures of a comparison: every seed's score by method, and how alike the seeds' selections are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weightlora.report.picture import WIDTH, Axis, Path, Picture, Text, box, dot, fitted, line
from weightlora.report.stability import Stability
from weightlora.report.tables import Table, groups
from weightlora.runs.record import Record, metric_words

ROW = 34
SIDE = 12
VALUE_ROOM = 110


def spread_picture(records: Sequence[Record], table: Table) -> Picture | None:
    """One line per method: each finished run a dot, the mean a bar, one standard deviation to each side."""
    rows = {row["label"]: row for row in table.rows}
    scores = {
        label: [
            (run.seed, run.score) for run in group
            if run.status == "ok" and run.score is not None and math.isfinite(run.score)
        ]
        for label, group in groups(records).items()
    }  # fmt: skip
    shown = [label for label, values in scores.items() if values]
    if not shown:
        return None
    ends = [score for values in scores.values() for _, score in values]
    for label in shown:
        mean, spread = rows[label]["score_mean"], rows[label]["score_spread"] or 0.0
        ends += [mean - spread, mean + spread]
    across = Axis.around(ends, SIDE, WIDTH - SIDE)
    paths, texts = [], []
    bottom = ROW * len(shown) + 4.0
    for x, words in across.ticks(5):
        paths.append(Path(d=line([(x, 0), (x, bottom)]), look="grid"))
        texts.append(Text(x=x, y=bottom + 14, words=words, look="mid"))
    for index, label in enumerate(shown):
        y = index * ROW + 24.0
        mean, spread = rows[label]["score_mean"], rows[label]["score_spread"]
        if not math.isfinite(mean):
            continue
        texts.append(Text(x=0, y=y - 11, words=fitted(label, WIDTH - VALUE_ROOM), look="start halo"))
        value = f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
        texts.append(Text(x=WIDTH, y=y - 11, words=value, look="end strong halo"))
        if spread:
            paths.append(Path(d=line([(across.at(mean - spread), y), (across.at(mean + spread), y)]), look="spread"))
        for seed, score in scores[label]:
            paths.append(Path(d=dot(across.at(score), y), look="dot kept", title=f"seed {seed}: {score:.4f}"))
        paths.append(Path(d=line([(across.at(mean), y - 7), (across.at(mean), y + 7)]), look="mean"))
    texts.append(Text(x=WIDTH, y=bottom + 28, words=fitted(metric_words(records[0].metric), 200), look="end name"))
    return Picture(
        name="spread",
        title="Score by method",
        about=f"{records[0].metric} of every finished run by method, with mean and standard deviation",
        height=bottom + 34,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(("dot kept", "one seed"), ("mean", "mean"), ("spread", "± one standard deviation")),
    )


def overlap_picture(found: Sequence[Stability]) -> Picture | None:
    """One bar per method: the share of adapters that two seeds have in common, beside that of random sets."""
    if not found:
        return None
    across = Axis(low=0, high=1, start=0, end=WIDTH)
    paths, texts = [], []
    for index, entry in enumerate(found):
        y = index * ROW + 17.0
        texts.append(Text(x=0, y=y - 5, words=fitted(entry.label, WIDTH - VALUE_ROOM)))
        texts.append(
            Text(x=WIDTH, y=y - 5, words=f"{entry.overlap:.0%}, random {entry.random_overlap:.0%}", look="end strong")
        )
        paths.append(Path(d=box(0, y, WIDTH, 9), look="track"))
        words = f"{entry.shared:.2f} adapters shared by a pair of seeds on average"
        paths.append(Path(d=box(0, y, max(0.5, across.at(entry.overlap)), 9), look="bar after", title=words))
        x = across.at(entry.random_overlap)
        paths.append(Path(d=line([(x, y - 2), (x, y + 11)]), look="chance"))
    return Picture(
        name="overlap",
        title="Do seeds agree?",
        about="Mean overlap of the adapters kept by two seeds, by method, beside that of random sets of the same size",
        height=len(found) * ROW + 2.0,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=(("bar after", "shared by two seeds"), ("chance", "random sets of the same size")),
    )

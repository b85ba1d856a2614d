"""Layers from bottom to top, module kinds from left to right: what one run kept, and what many runs kept how often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weightlora.report.layout import Grid, Place, layout
from weightlora.report.picture import FONT, LETTER, WIDTH, Path, Picture, Text, box, star
from weightlora.runs.record import AdapterScore, Record

LEVELS = 9  # steps of the colour ramp, q0 to q8
LEFT, TOP = 30, 22
WIDEST = 56  # a column
NARROWEST_LABEL = 12  # a column that can carry a name of its own


def selection_picture(record: Record) -> Picture:
    """Which adapters a run kept; the colour is omega, or the score where all omegas are equal."""
    what, values = shown_values(record)
    places = layout(record.adapters)
    kept = {entry.name for entry in record.kept}
    words = {place.adapter.name: _words(place, value, what) for place, value in zip(places, values, strict=True)}
    known = [value for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    marked = {name: f"{words[name]}, kept" for name in kept if name in words}
    paths, texts, bottom = _grid(places, [_level(value, low, high) for value in values], words, marked)
    if low < high:
        ramp, names, bottom = _ramp(bottom, what, f"{low:.3g}", f"{high:.3g}")
        paths, texts = paths + ramp, texts + names
    elif known:
        texts.append(Text(x=LEFT, y=bottom + 12, words=f"{what}: {low:.3g} everywhere", look="start name"))
        bottom += 18
    cells_of = Grid.of(places)
    keys = [("star", "kept")]
    if len(places) < len(cells_of.columns) * len(cells_of.rows):
        keys.append(("hole", "no adapter"))
    return Picture(
        name="selection",
        title="What was kept",
        about=f"Heat map of {len(places)} adapters by layer and module kind; {len(kept)} are kept and starred",
        height=bottom + 4,
        paths=tuple(paths),
        texts=tuple(texts),
        keys=tuple(keys),
    )


def shown_values(record: Record) -> tuple[str, tuple[float, ...]]:
    """What the colours mean and their values, one per adapter in order (NaN: undefined).

    Omega, unless all are equal and the method's scores are not.
    """
    omegas = tuple(adapter.omega for adapter in record.adapters)
    scores = tuple(math.nan if adapter.score is None else adapter.score for adapter in record.adapters)
    if len(_finite(omegas)) <= 1 < len(_finite(scores)):
        return f"score (all omega {'equal' if _finite(omegas) else 'undefined'})", scores
    return "gate omega", omegas


def _finite(values: tuple[float, ...]) -> set[float]:
    return {value for value in values if math.isfinite(value)}


def frequency_picture(label: str, adapters: Sequence[AdapterScore], counts: Mapping[str, int], runs: int) -> Picture:
    """How many of ``runs`` runs kept each adapter; those that all kept are starred."""
    places = layout(adapters)
    times = [counts.get(place.adapter.name, 0) for place in places]
    marked = {
        place.adapter.name: f"{place.short}: kept in all {runs} runs"
        for place, count in zip(places, times, strict=True)
        if count == runs
    }
    paths, texts, bottom = _grid(places, [_level(count, 0, runs) for count in times], {}, marked)
    ramp, names, bottom = _ramp(bottom, f"kept in … of {runs} runs", "0", str(runs), steps=runs + 1)
    return Picture(
        name="frequency",
        title=label,
        about=f"Heat map by layer and module kind of how many of {runs} runs of {label} kept each adapter",
        height=bottom + 4,
        paths=(*paths, *ramp),
        texts=(*texts, *names),
        keys=(("star", "kept in every run"),),
    )


def _words(place: Place, value: float, what: str) -> str:
    return f"{place.short}: {what.partition(' (')[0]} {value:.4g}"


def _level(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    share = (value - low) / (high - low) if high > low else 0.5
    return f"q{round(share * (LEVELS - 1))}"


def _grid(
    places: Sequence[Place], looks: Sequence[str], titles: Mapping[str, str], marked: Mapping[str, str]
) -> tuple[list[Path], list[Text], float]:
    """The cells, the stars and the names around them, and where they end below."""
    grid = Grid.of(tuple(places))
    span, tall = max(grid.columns.values()) + 1, max(grid.rows.values()) + 1
    wide = min(WIDEST, (WIDTH - LEFT - 2) / span)
    wide = float(int(wide)) if wide > 12 else wide  # whole numbers are sharp, and short to write
    high = 28 if tall <= 8 else 22 if tall <= 14 else 14 if tall <= 40 else 9
    at = {
        place.adapter.name: (
            LEFT + grid.columns[place.tower, place.kind] * wide,
            TOP + (tall - 1 - grid.rows[place.block]) * high,
        )
        for place in places
    }
    taken = set(at.values())
    every = [
        (LEFT + column * wide, TOP + (tall - 1 - row) * high)
        for column in grid.columns.values()
        for row in grid.rows.values()
    ]
    holes = "".join(box(x + 2, y + 2, wide - 4, high - 4) for x, y in every if (x, y) not in taken)
    by_look: dict[str, list[str]] = {}
    paths, stars = [], []
    for place, look in zip(places, looks, strict=True):
        name = place.adapter.name
        outline = box(at[name][0], at[name][1], wide, high)
        if name in titles and name not in marked:
            paths.append(Path(d=outline, look=f"cell {look}", title=titles[name]))
        else:
            by_look.setdefault(look, []).append(outline)
        if name in marked:
            x, y = at[name]
            middle = star(x + wide / 2, y + high / 2, max(2.5, min(7.5, 0.42 * min(wide, high))))
            stars.append(Path(d=box(x + 1, y + 1, wide - 2, high - 2), look="frame"))
            stars.append(Path(d=middle, look="star", title=marked[name]))
    paths += [Path(d="".join(outlines), look=f"cell {look}") for look, outlines in by_look.items()]
    texts, bottom = _names(grid, wide, high, tall)
    return [*([Path(d=holes, look="hole")] if holes else []), *paths, *stars], texts, bottom


def _names(grid: Grid, wide: float, high: float, tall: float) -> tuple[list[Text], float]:
    """Layer numbers at the left, kinds and towers below; and where those end."""
    count = len(grid.rows)
    every = 1 if count <= 14 else 4 if count <= 40 else 8
    texts = [Text(x=LEFT, y=TOP - 8, words="layer", look="start name")]
    for block, row in grid.rows.items():
        if block is None or block % every == 0:
            words = "-" if block is None else str(block)
            texts.append(Text(x=LEFT - 6, y=TOP + (tall - 0.5 - row) * high + 4, words=words, look="end"))
    bottom = TOP + tall * high
    kinds = list(grid.columns.items())
    lines = {kind: kind.replace(".", ".\n").split("\n") for (_, kind), _ in kinds}
    flat = max(len(part) for parts in lines.values() for part in parts) * LETTER < wide - 2
    if not flat:
        lines = {kind: _halved(kind) if wide > 2.4 * FONT else [kind] for kind in lines}
    skip = max(1, math.ceil(NARROWEST_LABEL / wide))
    for (_, kind), column in kinds[::skip]:
        middle = LEFT + (column + 0.5) * wide
        for index, part in enumerate(lines[kind]):
            if flat:
                texts.append(Text(x=middle, y=bottom + 14 + 12 * index, words=part, look="mid"))
            else:
                x = middle + 4 + 12 * (index - (len(lines[kind]) - 1) / 2)
                texts.append(Text(x=x, y=bottom + 6, words=part, look="end", turn=-90))
    if flat:
        depth = max(len(parts) for parts in lines.values()) * 12.0
    else:
        depth = max(len(part) for parts in lines.values() for part in parts) * (LETTER - 0.4)
    bottom += depth + 10
    if len(grid.towers) > 1:
        bottom += 12
        for tower, columns in grid.towers.items():
            middle = LEFT + ((columns[0] + columns[-1]) / 2 + 0.5) * wide
            texts.append(Text(x=middle, y=bottom, words=tower, look="mid strong"))
        bottom += 6
    return texts, bottom


def _halved(kind: str) -> list[str]:
    """``kind`` on two lines, broken at the dot nearest its middle."""
    dots = [index for index, letter in enumerate(kind) if letter == "."]
    if not dots:
        return [kind]
    middle = min(dots, key=lambda index: abs(index - len(kind) / 2))
    return [kind[: middle + 1], kind[middle + 1 :]]


def _ramp(top: float, what: str, low: str, high: str, steps: int = LEVELS) -> tuple[list[Path], list[Text], float]:
    """The colours from low to high with what they stand for, and where that ends below."""
    steps = min(steps, LEVELS)
    size = 14
    x = LEFT + LETTER * len(low) + 6
    paths = [
        Path(d=box(x + size * step, top + 4, size, 9), look=f"cell q{round(step * (LEVELS - 1) / (steps - 1))}")
        for step in range(steps)
    ]
    texts = [
        Text(x=LEFT, y=top + 12, words=low),
        Text(x=x + size * steps + 6, y=top + 12, words=high),
    ]
    beside = x + size * steps + 16 + LETTER * len(high)
    fits = beside + LETTER * len(what) < WIDTH
    texts.append(Text(x=beside if fits else LEFT, y=top + (12 if fits else 26), words=what, look="start name"))
    return paths, texts, top + (18 if fits else 32)

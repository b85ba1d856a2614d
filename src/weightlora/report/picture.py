"""Small vector pictures as plain data: the page's template turns them into SVG and escapes every word in them.

Lengths are those of the SVG's own box, which the page shows at about 1:1 on a phone, so that text stays readable.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path as Files

TEMPLATES = Files(__file__).parent / "templates"
WIDTH = 360
FONT = 11
LETTER = 6.3  # a wide guess at a letter's width at that size; nobody knows which font a reader has

LARGEST = 1e100  # of what is drawn: around larger numbers an axis would have no finite length
FAR = 1e6  # in units of a picture
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """An outline: ``d`` in SVG's own words, a CSS class, and what a reader sees who points at it."""

    d: str
    look: str
    title: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Words at (x, y); ``look`` says which end stands there (``start``, ``mid``, ``end``), ``turn`` is in degrees."""

    x: float
    y: float
    words: str
    look: str = "start"
    turn: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure: a title above it, what its marks mean, a sentence for those who cannot see it, and its marks.

    Args:
        name: for scripts, such as ``"loss"``.
        keys: ``(look, words)`` of each kind of mark.
        paths, texts: in the order of drawing.
    """

    name: str
    title: str
    about: str
    height: float
    paths: tuple[Path, ...]
    texts: tuple[Text, ...]
    keys: tuple[tuple[str, str], ...] = ()
    width: float = WIDTH

    def plain(self) -> Picture:
        """The same to the eye in far fewer letters: nothing is said when pointed at, one path for each look."""
        outlines: dict[str, list[str]] = {}
        for path in self.paths:
            outlines.setdefault(path.look, []).append(path.d)
        joined = tuple(Path(d="".join(parts), look=look) for look, parts in outlines.items())
        return dataclasses.replace(self, paths=joined)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A straight scale from values (``low`` to ``high``) to places (``start`` to ``end``)."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> Axis:
        """A scale that shows all values within reason, with some room around them; 0 to 1 if there are none."""
        known = [value for value in values if abs(value) <= LARGEST] or [0.0, 1.0]
        low, high = min(known), max(known)
        room = (high - low) * 0.05 or abs(high) * 0.1
        room = room if room > 1e-100 else 1.0
        return cls(low=low - room, high=high + room, start=start, end=end)

    def at(self, value: float) -> float:
        """Map a value to its place in the picture. A value beyond all bounds is put far outside."""
        value = min(max(value, -LARGEST), LARGEST)  # a whole number from a file may be too large for a float
        place = self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)
        return min(max(place, -FAR), FAR)

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[tuple[float, str]]:
        """``(place, words)`` of round values, at most ``most`` + 1 of them."""
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(self.low, self.high)
        room = (self.high - self.low) * 1e-9
        shown = [float(value) for value in values if self.low - room <= value <= self.high + room]
        return [(self.at(value), self._words(value)) for value in shown]

    def _words(self, value: float) -> str:
        """In as few digits as put it in its place."""
        short = f"{value:.10g}"
        return short if abs(self.at(float(short)) - self.at(value)) < 0.5 else repr(value)


def number(value: float) -> str:
    """A coordinate in few letters.

    >>> number(3.0), number(0.25), number(-0.04)
    ('3', '0.2', '0')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def line(points: Sequence[Point], *, digits: int = 1) -> str:
    """The outline through ``points``, in steps from one to the next, because those are short to write.

    >>> line([(0, 0), (10, 5.04), (20, 4)])
    'M0 0l10 5 10-1'
    """
    unit = 10**digits
    whole = [(round(x * unit), round(y * unit)) for x, y in points]  # rounded first: no error adds up
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(whole)]
    start, *rest = (f"{number(x / unit)} {number(y / unit)}" for x, y in [whole[0], *steps])
    return (f"M{start}" + (f"l{' '.join(rest)}" if rest else "")).replace(" -", "-")


def dot(x: float, y: float) -> str:
    """A point: a line of no length, to which its look gives round ends. Nothing else is as short to write."""
    return f"M{number(x)} {number(y)}h0"


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle."""
    return f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h-{number(width)}z"


def star(x: float, y: float, radius: float) -> str:
    """A star with five points, drawn in one stroke through its middle; its look hides the lines inside."""
    turns = (math.pi * 0.8 * corner for corner in range(5))
    return line([(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in turns]) + "z"


def thin(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most ``most`` of the points: of each stretch its lowest and its highest, so that no peak is lost.

    >>> thin([(0, 0), (1, 9), (2, 0), (3, 0), (4, 0), (5, 1)], 4)
    [(0, 0), (1, 9), (3, 0), (5, 1)]
    """
    if len(points) <= most:
        return points
    stretches = max(1, most // 2)
    edges = [round(index * len(points) / stretches) for index in range(stretches + 1)]
    kept = []
    for first, last in itertools.pairwise(edges):
        part = range(first, last)
        kept += sorted({min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])})
    return [points[index] for index in kept]


def fitted(words: str, room: float) -> str:
    """``words`` cut so that they fit, with an ellipsis where something is missing."""
    most = max(4, int(room / LETTER))
    return words if len(words) <= most else words[: most - 1] + "…"


def frame(
    across: Axis, up: Axis, *, across_name: str, up_name: str, whole: bool = True
) -> tuple[list[Path], list[Text]]:
    """Grid lines, tick labels (whole numbers across, or any) and axis names of a chart in the box of two axes."""
    paths, texts = [], []
    for y, words in up.ticks(4):
        paths.append(Path(d=line([(across.start, y), (across.end, y)]), look="grid"))
        texts.append(Text(x=across.start - 5, y=y + 4, words=words, look="end"))
    for x, words in across.ticks(5, whole=whole):
        texts.append(Text(x=x, y=up.start + 15, words=words, look="mid"))
    paths.append(Path(d=line([(across.start, up.start), (across.end, up.start)]), look="axis"))
    texts.append(Text(x=across.end, y=up.start + 30, words=across_name, look="end name"))
    texts.append(Text(x=across.start, y=up.end - 8, words=up_name, look="start name"))
    return paths, texts

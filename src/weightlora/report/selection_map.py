"""What a run kept, as a PNG: the page's own picture with its style sheet, drawn by matplotlib, with a title above."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.errors import ConfigError
from weightlora.report import picture
from weightlora.report.grids import LEFT, selection_picture
from weightlora.report.picture import FONT, LETTER, Picture, Text
from weightlora.report.png import short_model, write_png
from weightlora.runs.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = 6.4  # the picture's width, to be read at half of it too
DPI = 200
MARGIN = 6  # of nothing around, in the picture's units, as are all lengths below
LINE = 15
ANCHORS = {"start": "left", "mid": "center", "end": "right"}
MOVE, LINE_TO, CLOSE = 1, 2, 79  # as matplotlib counts the steps of an outline
Style = dict[str, str]


def selection_map(record: Record, path: str | os.PathLike[str]) -> Path:
    """Draw which adapters ``record`` kept, as a PNG at ``path``.

    One cell per adapter: its layer on the vertical axis (the lowest at the bottom), its kind on the horizontal one,
    its gate omega as colour. Where all gates are equal they say nothing, so the method's score is drawn instead; the
    line below the picture names which. Survivors carry a star and a frame; a dashed cell has no adapter. Equal records
    give equal bytes.

    Returns:
        ``path``.

    Raises:
        ConfigError: the record lists no adapters, or matplotlib is not installed.
    """
    if not record.adapters:
        raise ConfigError(
            f"the record of method {record.method!r} lists no adapters, so there is no selection to draw; "
            "draw a run of a method with adapters"
        )
    return write_png(lambda: _figure(selection_picture(record), _title(record)), path, compression=3)


def _title(record: Record) -> list[str]:
    """Two facts, wrapped to the picture's width: what was kept of what, and in which run."""
    alive = f"{len(record.kept)} of {record.n_adapters} adapters kept"
    where = f"{record.task}, {short_model(record.model)}, seed {record.seed}"
    lines = f"{record.method} ({record.preset}): {alive}", where
    return [part for line in lines for part in textwrap.wrap(line, 52)]


def _figure(shown: Picture, title: Sequence[str]) -> Figure:
    """A picture in the page's light colours, one unit being as many points as fit `INCHES`."""
    from matplotlib.figure import Figure

    width = shown.width + 2 * MARGIN
    above, below = LINE * len(title) + 2 * MARGIN, LINE + 2 * MARGIN
    height = above + shown.height + below
    figure = Figure(figsize=(INCHES, INCHES * height / width), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-MARGIN, shown.width + MARGIN)
    axes.set_ylim(shown.height + below, -above)
    axes.axis("off")
    scale, sheet = INCHES * 72 / width, _Sheet.of_the_page()
    for path in shown.paths:
        _draw(axes, path.d, sheet.looks(path.look), scale)
    for text in shown.texts:
        _write(axes, text, sheet, scale)
    for number, line in enumerate(title, 1):
        text = Text(x=shown.width / 2, y=LINE * number - above + MARGIN, words=line, look="mid strong")
        _write(axes, text, sheet, scale)
    left: float = LEFT
    for look, words in shown.keys:
        y = shown.height + LINE
        outline = picture.star(left + 6, y - 4, 6) if look == "star" else picture.box(left, y - 8, 12, 8)
        _draw(axes, outline, sheet.looks(look), scale)
        _write(axes, Text(x=left + 17, y=y, words=words), sheet, scale)
        left += 36 + LETTER * len(words)
    return figure


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """The page's style sheet: its light colours, and what it says of each look."""

    colours: Style
    rules: Mapping[str, Style]

    @classmethod
    def of_the_page(cls) -> _Sheet:
        text = (picture.TEMPLATES / "report.css").read_text(encoding="utf-8")
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", text.partition("@media")[0]))
        rules = {}
        for look, body in re.findall(r"(?<![\w.])\.([\w-]+) \{([^}]*)\}", text):
            said = dict(re.findall(r"([\w-]+): ([^;]+);", body + ";"))
            rules[look] = {name: re.sub(r"var\(--([\w-]+)\)", lambda m: colours[m[1]], v) for name, v in said.items()}
        return cls(colours, rules)

    def looks(self, names: str) -> Style:
        """What all of these looks come to; the last has the last word."""
        found: Style = {}
        for name in names.split():
            found |= self.rules.get(name, {})
        return found


def _draw(axes: Axes, d: str, said: Style, scale: float) -> None:
    """One outline; its edge lies below its filling where the sheet says so."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    face, edge = said.get("fill", "none"), said.get("stroke", "none")
    wide = float(said.get("stroke-width", 1))
    dashes = tuple(float(part) / wide for part in said.get("stroke-dasharray", "").split())
    outline = Outline(*_vertices(d))
    parts = [(face, edge)] if said.get("paint-order") != "stroke" else [("none", edge), (face, "none")]
    for filled, drawn in parts:
        patch = PathPatch(outline, facecolor=filled, edgecolor=drawn, linewidth=wide * scale, joinstyle="round")
        if dashes:
            patch.set_linestyle((0, dashes))
        axes.add_artist(patch)  # as a patch it would move the limits


def _vertices(d: str) -> tuple[list[tuple[float, float]], list[int]]:
    """The points of an outline in the words that this package writes: M, l, h, v and z, and matplotlib's codes.

    >>> _vertices("M1 2h3v-1.5z")
    ([(1.0, 2.0), (4.0, 2.0), (4.0, 0.5), (1.0, 2.0)], [1, 2, 2, 79])
    """
    points: list[tuple[float, float]] = []
    codes: list[int] = []
    begin = (0.0, 0.0)
    for word, rest in re.findall(r"([Mlhvz])([^Mlhvz]*)", d):
        numbers = [float(text) for text in re.findall(r"-?\d*\.?\d+", rest)]
        if word == "z":
            points.append(begin)
            codes.append(CLOSE)
            continue
        steps = [(n, 0.0) for n in numbers] if word == "h" else [(0.0, n) for n in numbers]
        if word in "Ml":
            steps = list(zip(numbers[::2], numbers[1::2], strict=True))
        for x, y in steps:
            at = (x, y) if word == "M" else (points[-1][0] + x, points[-1][1] + y)
            begin = at if word == "M" else begin
            points.append(at)
            codes.append(MOVE if word == "M" else LINE_TO)
    return points, codes


def _write(axes: Axes, text: Text, sheet: _Sheet, scale: float) -> None:
    looks = text.look.split()
    strong = "strong" in looks
    axes.text(
        text.x,
        text.y,
        text.words,
        fontsize=0.95 * FONT * scale,
        color=sheet.colours["ink" if strong else "muted"],
        fontweight="bold" if strong else "normal",
        ha=next((ANCHORS[look] for look in looks if look in ANCHORS), "left"),
        va="baseline",
        rotation=-text.turn,
        rotation_mode="anchor",
        parse_math=False,
    )

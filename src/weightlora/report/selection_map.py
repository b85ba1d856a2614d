"""A picture of what a run kept: layers from bottom to top, module kinds from left to right, omega as colour."""

from __future__ import annotations

import io
import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError
from weightlora.files import new_file
from weightlora.report.layout import Grid, Place, layout
from weightlora.runs.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

WIDTH = 6.4  # inches, as are all lengths below; the picture is to be read at half of it too
DPI = 200
FONT = 11
LEFT, RIGHT, TOP = 0.72, 1.05, 0.62
COLUMN = 1.05  # the widest a column may be
_NO_ADAPTER: dict[str, Any] = {"facecolor": "#e4e4e4", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0.0}


def selection_map(record: Record, path: str | os.PathLike[str]) -> Path:
    """Draw which adapters ``record`` kept, as a PNG at ``path``.

    One cell per adapter: its layer on the vertical axis (the lowest at the bottom), its kind on the horizontal one,
    its gate omega as colour. Where all gates are equal they say nothing, so the method's score is drawn instead; the
    colour bar names which. Survivors carry a star and a frame; a hatched cell has no adapter. Equal records give equal
    bytes. No global state of matplotlib is changed, and no window system is needed.

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
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'weightlora[report]'") from error
    stream = io.BytesIO()
    with style.context("default"):  # the user's own style would change sizes and colours
        figure = _figure(record)
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png", metadata={"Software": None})
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(stream.getvalue())
    return Path(path)


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


def _figure(record: Record) -> Figure:
    """The whole picture. Every length is reckoned in inches, so that no shape of model squeezes the text."""
    from matplotlib.figure import Figure

    places = layout(record.adapters)
    grid = Grid.of(places)
    span, height = max(grid.columns.values()) + 1, max(grid.rows.values()) + 1
    width = min(WIDTH - LEFT - RIGHT, max(COLUMN * span, 1.2))
    labels, rotated = _column_labels(grid, width / span)
    lines = max(label.count("\n") + 1 for label in labels)
    below = max(_length(line) for label in labels for line in label.split("\n")) if rotated else lines * 0.19
    below += 0.1 + 0.26 * (len(grid.towers) > 1)
    legend = 0.44
    tall = max(height * (0.34 if height <= 14 else 0.25 if height <= 40 else 0.16), 0.6)
    title = _title(record)
    top = TOP + 0.2 * (title.count("\n") - 1)
    total = top + tall + below + legend
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    left = LEFT + (WIDTH - LEFT - RIGHT - width) / 2
    bottom = (below + legend) / total
    axes = figure.add_axes((left / WIDTH, bottom, width / WIDTH, tall / total))
    mappable = _draw_cells(axes, record, places, grid)
    _draw_survivors(axes, record, places, grid, inset=(0.04 / (width / span), 0.04 / (tall / height)))
    _draw_axes(axes, grid, labels, rotated, below / tall)
    bar = figure.add_axes(((left + width + 0.16) / WIDTH, bottom, 0.17 / WIDTH, tall / total))
    _draw_bar(figure, bar, mappable, record, tall)
    figure.text(0.5, 1 - 0.1 / total, title, ha="center", va="top", fontsize=FONT + 1, parse_math=False)
    gaps = len(places) < len(grid.columns) * len(grid.rows)
    _draw_legend(figure, dropped=len(record.kept) < len(places), gaps=gaps)
    return figure


def _title(record: Record) -> str:
    """Two facts, wrapped to the picture's width: what was kept of what, and in which run."""
    alive = f"{len(record.kept)} of {record.n_adapters} adapters kept"
    model = record.model
    if model.count("/") > 1 or "\\" in model:  # a folder: its last name says enough
        model = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    lines = f"{record.method} ({record.preset}): {alive}", f"{record.task}, {model}, seed {record.seed}"
    return "\n".join("\n".join(textwrap.wrap(line, 58)) for line in lines)


def _column_labels(grid: Grid, column: float) -> tuple[list[str], bool]:
    """The kinds as tick labels, and whether they must stand upright to fit a column of that many inches."""
    kinds = [kind for _, kind in grid.columns]
    flat = [kind.replace(".", ".\n") for kind in kinds]
    rotated = max(_length(line) for label in flat for line in label.split("\n")) > column - 0.06
    if not rotated:
        return flat, False
    return [_halved(kind) if column > 0.45 and len(kind) > 16 else kind for kind in kinds], True


def _halved(kind: str) -> str:
    """``kind`` on two lines, broken at the dot nearest its middle."""
    dots = [index for index, letter in enumerate(kind) if letter == "."]
    if not dots:
        return kind
    middle = min(dots, key=lambda index: abs(index - len(kind) / 2))
    return kind[: middle + 1] + "\n" + kind[middle + 1 :]


def _length(line: str) -> float:
    """How long a line of text is at the picture's size."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), line.replace("$", "S"), size=FONT).get_extents().width) / 72


def _draw_cells(axes: Axes, record: Record, places: tuple[Place, ...], grid: Grid) -> ScalarMappable:
    """One rectangle per cell, hatched where there is no adapter, with "?" where there is no value."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    _, values = shown_values(record)
    known = _finite(values) or {0.0}
    low, high = min(known), max(known)
    if low == high:
        low, high = low - 0.5, high + 0.5
    colours = colormaps["cividis"]
    mappable = ScalarMappable(norm=Normalize(low, high), cmap=colours)
    value_at = {
        (grid.columns[place.tower, place.kind], grid.rows[place.block]): value
        for place, value in zip(places, values, strict=True)
    }
    for x in grid.columns.values():
        for y in grid.rows.values():
            if (x, y) not in value_at:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **_NO_ADAPTER))
    for (x, y), value in value_at.items():
        colour = colours((value - low) / (high - low)) if math.isfinite(value) else "white"
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
        if not math.isfinite(value):
            axes.text(x - 0.25, y, "?", ha="center", va="center", fontsize=FONT - 1)
    return mappable


def _draw_survivors(
    axes: Axes, record: Record, places: tuple[Place, ...], grid: Grid, inset: tuple[float, float]
) -> None:
    """A star and a frame for each kept adapter, both black and white, so that any colour shows them."""
    from matplotlib.patches import Rectangle

    kept = {entry.name for entry in record.kept}
    across, up = inset
    for place in places:
        if place.adapter.name not in kept:
            continue
        x, y = grid.columns[place.tower, place.kind], grid.rows[place.block]
        corner = (x - 0.5 + across, y - 0.5 + up)
        for colour, thick in (("black", 3.6), ("white", 1.5)):
            frame = Rectangle(corner, 1 - 2 * across, 1 - 2 * up, fill=False, edgecolor=colour, linewidth=thick)
            axes.add_patch(frame).set_zorder(3)
        axes.plot(x, y, zorder=4, **_star(10))


def _star(size: float) -> dict[str, Any]:
    """The survivors' mark as arguments of a line without a line."""
    return {
        "marker": "*",
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "markeredgewidth": 0.9,
        "linestyle": "none",
    }


def _draw_axes(axes: Axes, grid: Grid, labels: list[str], rotated: bool, below: float) -> None:
    """Limits, ticks and names; ``below`` is the depth of the labels as a fraction of the axes' height."""
    axes.set_xlim(-0.5, max(grid.columns.values()) + 0.5)
    axes.set_ylim(-0.5, max(grid.rows.values()) + 0.5)
    axes.set_xticks(list(grid.columns.values()), labels, fontsize=FONT, parse_math=False)
    if rotated:
        axes.tick_params(axis="x", rotation=90)
    count = len(grid.rows)
    every = 1 if count <= 14 else 2 if count <= 40 else 5
    shown = {block: y for block, y in grid.rows.items() if block is None or block % every == 0}
    names = ["other" if block is None else str(block) for block in shown]
    axes.set_yticks(list(shown.values()), names, fontsize=FONT)
    axes.set_ylabel("layer", fontsize=FONT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(grid.towers) < 2:
        return
    for tower, xs in grid.towers.items():
        place: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(
            tower, ((xs[0] + xs[-1]) / 2, -below), xycoords=("data", "axes fraction"), fontsize=FONT,
            fontweight="bold", parse_math=False, **place,
        )  # fmt: skip


def _draw_bar(figure: Figure, bar: Axes, mappable: ScalarMappable, record: Record, tall: float) -> None:
    """The colour bar, with few enough ticks for its height, and the name of what it shows."""
    from matplotlib.ticker import MaxNLocator

    label, values = shown_values(record)
    known = _finite(values)
    colours = figure.colorbar(mappable, cax=bar)
    if len(known) == 1:  # one value has no scale
        colours.set_ticks(list(known), labels=[f"{value:.3g}" for value in known])
    else:
        colours.locator = MaxNLocator(nbins=max(2, min(6, int(tall / 0.35))))
        colours.update_ticks()
    bar.tick_params(labelsize=FONT - 1, length=3)
    colours.set_label(label, fontsize=FONT if tall > _length(label) else FONT - 2)
    colours.outline.set_visible(False)


def _draw_legend(figure: Figure, dropped: bool, gaps: bool) -> None:
    """What the marks mean, in one line at the foot."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey = "#7b7b78"
    star = Line2D([], [], **_star(9))
    marks: list[tuple[Any, str]] = [((Patch(facecolor=grey, edgecolor="black", linewidth=1.6), star), "kept")]
    if dropped:
        marks.append((Patch(facecolor=grey), "disconnected"))
    if gaps:
        marks.append((Patch(**_NO_ADAPTER), "no adapter"))
    handles: list[Any] = [handle for handle, _ in marks]
    names = [name for _, name in marks]
    figure.legend(handles, names, loc="lower center", ncols=3, fontsize=FONT, frameon=False, borderaxespad=0.2)

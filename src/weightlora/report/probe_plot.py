"""The paper's Figure 2 from a probe's JSON: how much each adapter would change the loss, by layer and module kind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from weightlora.decoding import decode
from weightlora.errors import CheckpointError, ConfigError
from weightlora.report.layout import Place, layout
from weightlora.report.png import FONT, plain_axes, short_model, write_png
from weightlora.report.units import mean_and_spread
from weightlora.runs.record import AdapterScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mode = Literal["cheap", "paper"]
WIDTH, DPI = 6.4, 200  # inches; the picture is to be read at half its width too
PANEL = 1.7  # the height of one panel
MEAN, SPREAD, STAR = "#0a5ca8", "#9cbfe0", "#f2a900"  # told apart by lightness and by shape, not by hue alone
OUTSIDE = -1.6  # where adapters outside the layers stand
WORDS: Mapping[Mode, str] = {
    "cheap": "all adapters in one run, from the gates' gradients",
    "paper": "one adapter at a time, as in the paper",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSeed:
    """What one seed measured.

    Args:
        seed: of everything random.
        products: the scalar product of gradient and adapter, one per adapter in order; NaN where it is undefined.
        selected: names of the adapters that were selected with this seed.
    """

    seed: int
    products: tuple[float, ...]
    selected: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeAdapter:
    """Where an adapter lies; the block is None outside the layers."""

    name: str
    block: int | None
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe as it lies in its JSON file.

    Args:
        adapters: each of them, in order.
        seeds: one entry per seed.
        mode: "cheap" (one run, gate gradients) or "paper" (one adapter at a time).
        task, model, steps: what was probed, and for how many optimizer steps.

    Raises:
        ConfigError: the parts do not fit together.

    Source: paper, section 3.1 and Figure 2: ``|<grad_{W_i} f, A_i B_i>|`` for each layer i, over seeds.
    """

    adapters: tuple[ProbeAdapter, ...]
    seeds: tuple[ProbeSeed, ...]
    mode: Mode
    task: str
    model: str
    steps: int

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"the probe's mode is {self.mode!r}; allowed are {', '.join(get_args(Mode))}")
        names = {adapter.name for adapter in self.adapters}
        if not self.adapters or not self.seeds:
            raise ConfigError("the probe has no adapters or no seeds, so there is nothing to draw; measure it again")
        if len(names) < len(self.adapters):
            raise ConfigError("the probe names an adapter more than once; measure it again")
        for entry in self.seeds:
            if len(entry.products) != len(self.adapters):
                raise ConfigError(
                    f"seed {entry.seed} of the probe has {len(entry.products)} products,"
                    f" but there are {len(self.adapters)} adapters"
                )
            strange = sorted(set(entry.selected) - names)
            if strange:
                raise ConfigError(
                    f"seed {entry.seed} of the probe selects {strange[0]!r}, which is not among its adapters"
                )

    @classmethod
    def from_dict(cls, data: Any) -> Probe:
        """Read plain data; ``null`` among the products reads as NaN, unknown keys are ignored.

        Raises:
            ConfigError: a key is missing or has the wrong type.

        >>> probe = Probe.from_dict({
        ...     "adapters": [{"name": "layer.0.query", "block": 0, "kind": "query"}],
        ...     "seeds": [{"seed": 0, "products": [-0.5], "selected": ["layer.0.query"]}],
        ...     "mode": "cheap", "task": "sst2", "model": "minilm", "steps": 100})
        >>> probe.magnitudes(0)
        [0.5]
        """
        try:
            return decode(cls, data, "")
        except CheckpointError as error:
            raise ConfigError(f"this is not a probe's JSON, or it is damaged: {error}") from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a file of `weightlora probe`.

        Raises:
            ConfigError: it cannot be read, or `from_dict`'s reasons; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read the probe {path}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None

    def magnitudes(self, index: int) -> list[float]:
        """The absolute products of one adapter, one per seed in which it is defined."""
        return [abs(entry.products[index]) for entry in self.seeds if math.isfinite(entry.products[index])]

    def times_selected(self, index: int) -> int:
        """In how many seeds an adapter was selected."""
        return sum(self.adapters[index].name in entry.selected for entry in self.seeds)


def probe_plot(probe: Probe, path: str | os.PathLike[str]) -> Path:
    """Draw ``|<grad, A B>|`` by layer, one panel per module kind on a common scale, as a PNG at ``path``.

    A point is the mean over seeds, its bar one sample standard deviation to each side (from two seeds on). A star
    marks what at least one seed selected; where seeds disagree, a number above it says how many did (left out in
    models of more than 16 layers, for want of room). Equal probes give equal bytes.

    Returns:
        ``path``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return write_png(lambda: _figure(probe), path)


def _panels(probe: Probe) -> dict[str, list[tuple[int, Place]]]:
    """Panel title to its adapters (index, place), in module order, by tower and kind."""
    scores = [AdapterScore(**vars(each), omega=1.0, score=None, kept=False) for each in probe.adapters]
    panels: dict[str, list[tuple[int, Place]]] = {}
    for index, place in enumerate(layout(scores)):
        title = f"{place.tower}: {place.kind}" if place.tower else place.kind
        panels.setdefault(title, []).append((index, place))
    return panels


def _figure(probe: Probe) -> Figure:
    """The whole picture. Every length is reckoned in inches, so that no shape of model squeezes the text."""
    from matplotlib.figure import Figure

    panels = _panels(probe)
    columns = min(2, len(panels))
    head, foot, left, right, gap = 0.56, 0.6, 0.82, 0.12, 0.2
    total = head + foot + math.ceil(len(panels) / columns) * PANEL
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    wide = (WIDTH - left - right - gap * (columns - 1)) / columns
    top = max(sum(_bar(probe.magnitudes(index))) for index in range(len(probe.adapters))) or 1.0
    exponent = math.floor(math.log10(top))
    exponent = 0 if -2 < exponent < 4 else exponent
    last = _last(probe)
    for number, (title, members) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        bottom = total - head - (row + 1) * PANEL + 0.3
        box = (left + column * (wide + gap)) / WIDTH, bottom / total, wide / WIDTH, (PANEL - 0.6) / total
        axes = figure.add_axes(box)
        _draw_panel(axes, probe, members, 10.0**exponent)
        _draw_scales(axes, top / 10.0**exponent, last, outside=any(each.block is None for each in probe.adapters))
        axes.set_title(title, fontsize=FONT, loc="left", pad=4, parse_math=False)
        if column:
            axes.tick_params(labelleft=False)
    _draw_words(figure, probe, total, exponent)
    return figure


def _bar(values: Sequence[float]) -> tuple[float, float]:
    """Mean and spread; 0 where there is none."""
    mean, spread = mean_and_spread(values)
    return mean or 0.0, spread or 0.0


def _draw_panel(axes: Axes, probe: Probe, members: Sequence[tuple[int, Place]], unit: float) -> None:
    """One kind: a point and a bar per layer, stars where it was selected."""
    crowded = _crowded(probe)
    for index, place in members:
        values = [value / unit for value in probe.magnitudes(index)]
        if not values:
            continue
        x = OUTSIDE if place.block is None else place.block
        mean, spread = _bar(values)
        times = probe.times_selected(index)
        axes.plot([x, x], [max(0.0, mean - spread), mean + spread], color=SPREAD, linewidth=4, solid_capstyle="butt")
        axes.plot([x], [mean], zorder=3, clip_on=False, **_mark(bool(times), crowded))
        if 0 < times < len(probe.seeds) and not crowded:
            axes.annotate(
                str(times),
                (x, mean + spread),
                fontsize=FONT - 2,
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
            )


def _crowded(probe: Probe) -> bool:
    """Whether there are too many layers for large marks with numbers on them."""
    return _last(probe) > 15


def _last(probe: Probe) -> int:
    """The number of the highest layer."""
    return max((each.block for each in probe.adapters if each.block is not None), default=0)


def _mark(starred: bool, crowded: bool) -> dict[str, Any]:
    """An adapter's mark as arguments of a line without a line."""
    if starred:
        size = 10 if crowded else 13
        edge = {"markerfacecolor": STAR, "markeredgecolor": "black", "markeredgewidth": 0.8}
        return {"marker": "*", "markersize": size, "linestyle": "none", **edge}
    return {"marker": "o", "markersize": 3.5 if crowded else 5, "color": MEAN, "linestyle": "none"}


def _draw_scales(axes: Axes, top: float, last: int, outside: bool) -> None:
    """Limits, ticks and lines, the same in every panel."""
    axes.set_xlim(OUTSIDE - 0.6 if outside else -0.6, last + 0.6)
    axes.set_ylim(0, top * 1.2)
    every = max(1, math.ceil((last + 1) / 7))
    ticks = {OUTSIDE: "other"} if outside else {}
    ticks |= {block: str(block) for block in range(0, last + 1, every)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.locator_params(axis="y", nbins=4)
    plain_axes(axes)


def _draw_words(figure: Figure, probe: Probe, total: float, exponent: int) -> None:
    """Title, names of the axes, and what the marks mean."""
    from matplotlib.lines import Line2D

    seeds = len(probe.seeds)
    lines = (
        f"{probe.task}, {short_model(probe.model)}, {probe.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}",
        WORDS[probe.mode],
    )
    figure.text(0.5, 1 - 0.08 / total, "\n".join(lines), ha="center", va="top", fontsize=FONT, parse_math=False)
    unit = f", $10^{{{exponent}}}$" if exponent else ""
    formula = r"$|\langle \nabla_W L,\ \Delta W \rangle|$"
    middle = 0.5 + 0.5 * (0.6 - 0.56) / total
    figure.text(0.018, middle, f"{formula} (loss{unit})", rotation=90, va="center", fontsize=FONT)
    figure.text(0.5, 0.46 / total, "layer", ha="center", va="center", fontsize=FONT)
    handles = [Line2D([], [], **_mark(False, False)), Line2D([], [], **_mark(True, False))]
    names = ["adapter", "selected"]
    if seeds > 1:
        handles.insert(1, Line2D([], [], color=SPREAD, linewidth=4))
        names = [
            "mean over seeds",
            "± standard deviation",
            "selected by any" if _crowded(probe) else "selected (by how many)",
        ]
    figure.legend(
        handles, names, loc="lower center", ncols=3, fontsize=FONT - 1, frameon=False, borderaxespad=0.1,
        handletextpad=0.4, columnspacing=1.4, handlelength=1.4,
    )  # fmt: skip

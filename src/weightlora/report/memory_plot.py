"""The paper's Figure 3 from its JSON: memory against the number of connected adapters, ours beside PEFT's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import ConfigError
from weightlora.report.png import FONT, plain_axes, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 6.4, 4.0, 200  # inches; to be read at half its width too
COLOURS = ("#0a5ca8", "#d55e00", "#009e73", "#8b4a8b", "#666666", "#f2a900")  # told apart by the colour-blind
LIMIT = "#c00000"
TITLES = {"deepest": "the deepest K", "random": "K at random"}


def memory_plot(data: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw ``weightlora memory``'s JSON as a PNG at ``path``: a panel per order, a colour per rank, PEFT dashed.

    Raises:
        ConfigError: matplotlib is not installed, or this is no such JSON.
    """
    return write_png(lambda: _figure(data), path)


def _figure(data: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    try:
        for panel, order in zip(panels, TITLES, strict=True):
            _draw(panel, data, order)
        top = max([r["total_bytes"] for r in data["records"]] + [data["limit_bytes"] or 0])
        words = f"{data['task']}, {data['model']}, micro-batch {data['micro_batch']} x {data['length']} tokens"
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"this is not the JSON of `weightlora memory`, or it is damaged: {error!r}") from None
    panels[0].set_ylim(0, top / unit(data)[0] * 1.08)
    panels[0].set_ylabel(f"memory of a run ({unit(data)[1]})", fontsize=FONT)
    handles, names = panels[0].get_legend_handles_labels()
    figure.suptitle(words, fontsize=FONT)
    figure.supxlabel("connected adapters K", fontsize=FONT, y=0.17)
    # Filled column by column: one for each rank, and one for the device.
    columns = min(4, (len(names) + 1) // 2)
    figure.legend(
        handles, names, loc="lower center", ncols=columns, fontsize=FONT - 1, frameon=False, borderaxespad=0.2,
        columnspacing=1.2, handlelength=1.8, handletextpad=0.5,
    )  # fmt: skip
    figure.subplots_adjust(left=0.12, right=0.98, top=0.84, bottom=0.3, wspace=0.08)
    return figure


def unit(data: Mapping[str, Any]) -> tuple[int, str]:
    """The unit of the whole picture, by its largest number."""
    largest = max(record["total_bytes"] for record in data["records"])
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _draw(axes: Axes, data: Mapping[str, Any], order: str) -> None:
    scale = unit(data)[0]
    ranks = sorted({record["rank"] for record in data["records"]})
    for number, rank in enumerate(ranks):
        for who, look in (("stock", "--"), ("ours", "-")):
            line = [r for r in data["records"] if (r["order"], r["rank"], r["path"]) == (order, rank, who)]
            axes.plot(
                [r["k"] for r in line], [r["total_bytes"] / scale for r in line], look, marker=".", markersize=5,
                linewidth=1.6, color=COLOURS[number % len(COLOURS)],
                label=f"{'PEFT' if who == 'stock' else 'ours'}, r = {rank}",
            )  # fmt: skip
    if data["limit_bytes"]:
        axes.axhline(data["limit_bytes"] / scale, color=LIMIT, linestyle=(0, (6, 2)), linewidth=1.4, label="device")
    axes.set_title(TITLES[order], fontsize=FONT, loc="left", pad=4)
    axes.locator_params(axis="x", integer=True, nbins=6)
    plain_axes(axes)

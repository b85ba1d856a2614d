"""Figures of matplotlib as files, and what they have in common."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.errors import ConfigError
from weightlora.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 11


def write_png(draw: Callable[[], Figure], path: str | os.PathLike[str], *, compression: int = 6) -> Path:
    """Draw a figure in matplotlib's default style, and write it; equal figures give equal bytes.

    No global state of matplotlib is changed, and no window system is needed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'weightlora[report]'") from error
    stream = io.BytesIO()
    with style.context("default"):  # the user's own style would change sizes and colours
        figure = draw()
        FigureCanvasAgg(figure)
        saving = {"compress_level": compression}
        figure.savefig(stream, format="png", metadata={"Software": None}, pil_kwargs=saving)
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(stream.getvalue())
    return Path(path)


def plain_axes(axes: Axes) -> None:
    """Give axes light lines on two sides, and a grid for what is read off upwards."""
    axes.tick_params(labelsize=FONT - 1, length=3, color="#888888")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")


def short_model(model: str) -> str:
    """A hub name as it is; of a folder its last part.

    >>> short_model("owner/name"), short_model("/models/mine/")
    ('owner/name', 'mine')
    """
    if model.count("/") > 1 or "\\" in model:
        return model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return model

"""The picture is really drawn: its pixels are read back and compared with what the record says."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from weightlora.errors import ConfigError
from weightlora.report import selection_map
from weightlora.report.grids import shown_values
from weightlora.report.selection_map import DPI, INCHES
from weightlora.runs.record import Record

SHAPES = ["bert", "deberta", "llama", "bart", "one", "holes"]


# Of the page's style sheet, in light: the lowest, the middle and the highest of the ramp, a star, its edge, a hole's.
LOW, MIDDLE, HIGH = "#edf3f9", "#6ea2cd", "#06376b"
STAR, INK, HOLE = "#f2a900", "#1a1f26", "#aab2bc"
UNIT = INCHES * DPI / 372  # pixels; the picture is 360 wide, with a margin of 6


def pixels(path: Path) -> NDArray[np.float64]:
    """(height, width, 3), 0 to 1."""
    return np.asarray(image.imread(path), dtype=np.float64)[..., :3]


def amount(picture: NDArray[np.float64], colour: str) -> int:
    """How many pixels have that colour."""
    return int((np.abs(picture - np.asarray(to_rgb(colour))).max(axis=-1) < 1.5 / 255).sum())


def gated(record: Record, omegas: list[float]) -> Record:
    adapters = tuple(dataclasses.replace(a, omega=w) for a, w in zip(record.adapters, omegas, strict=True))
    return dataclasses.replace(record, adapters=adapters)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_drawn(make: Callable[..., Record], tmp_path: Path, shape: str) -> None:
    path = tmp_path / "map.png"
    assert selection_map(make(shape), path) == path
    picture = pixels(path)
    height, width, _ = picture.shape
    assert width == round(INCHES * DPI)
    assert 0.2 * width < height < 2.5 * width
    assert len(np.unique((picture * 255).astype(int) @ (1 << 16, 1 << 8, 1))) > 50, "colours"
    for border in (picture[:6], picture[-6:], picture[:, :6], picture[:, -6:]):
        assert border.min() == 1.0, "something is cut off at the edge"
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


def test_each_omega_gets_its_colour(make: Callable[..., Record], tmp_path: Path) -> None:
    """The extremes of the ramp stand for the extremes of omega; one cell each, all others in the middle."""
    record = gated(make("deberta", k=1), [0.5] * 36)
    dropped = [index for index, adapter in enumerate(record.adapters) if not adapter.kept][:2]
    omegas = [0.5] * 36
    omegas[dropped[0]], omegas[dropped[1]] = 0.0, 1.0
    picture = pixels(selection_map(gated(record, omegas), tmp_path / "map.png"))
    low, middle, high = (amount(picture, colour) for colour in (LOW, MIDDLE, HIGH))
    assert low > 10_000
    assert high > 10_000
    assert 28 * min(low, high) < middle < 36 * max(low, high)


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_survivor_is_marked_on_every_colour(make: Callable[..., Record], tmp_path: Path, level: float) -> None:
    """Keeping one cell more changes that cell: a star and a dark frame appear inside it, whatever its colour."""
    omegas = [level, 0.0, 1.0] + [0.5] * 33
    one, two = gated(make("deberta", k=35), omegas), gated(make("deberta", k=36), omegas)
    missing = next(index for index, adapter in enumerate(one.adapters) if not adapter.kept)
    omegas[0], omegas[missing] = 0.5, level
    one, two = gated(one, omegas), gated(two, omegas)
    before = pixels(selection_map(one, tmp_path / "one.png"))
    after = pixels(selection_map(two, tmp_path / "two.png"))
    cell = np.s_[int(50 * UNIT) :]  # the title counts the survivors, so it differs too
    changed = np.abs(before[cell] - after[cell]).max(axis=-1) > 0.2
    rows, columns = np.nonzero(changed)
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    inside = after[cell][box]
    assert box[0].stop - box[0].start < 23 * UNIT
    assert box[1].stop - box[1].start < 57 * UNIT
    assert amount(inside, STAR) > 200
    assert amount(inside, INK) > 200
    assert amount(before[cell][box], STAR) == 0


def test_cells_without_adapter_are_dashed(make: Callable[..., Record], tmp_path: Path) -> None:
    holes = pixels(selection_map(make("holes"), tmp_path / "holes.png"))
    full = pixels(selection_map(make("bert"), tmp_path / "full.png"))
    assert amount(holes, HOLE) > 500
    assert amount(full, HOLE) < 50  # the edges of letters


def test_equal_records_make_equal_bytes(make: Callable[..., Record], tmp_path: Path) -> None:
    """In the same process under another user's style, and in another process."""
    record = make("bart")
    first = selection_map(record, tmp_path / "first.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50}):
        second = selection_map(record, tmp_path / "second.png").read_bytes()
    record.write(tmp_path / "record.json")
    code = (
        "import sys; from weightlora.runs.record import Record; from weightlora.report import selection_map; "
        "selection_map(Record.read(sys.argv[1]), sys.argv[2]); "
        "wrong = {'torch', 'matplotlib.pyplot'} & set(sys.modules); sys.exit(repr(wrong) if wrong else 0)"
    )
    third = tmp_path / "third.png"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "record.json"), str(third)],
        env=os.environ | {"MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert first == second == third.read_bytes()


def test_global_settings_are_left_alone(make: Callable[..., Record], tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 7.5, "axes.grid": True}):
        before = dict.copy(matplotlib.rcParams)
        selection_map(make("one"), tmp_path / "map.png")
        assert dict.copy(matplotlib.rcParams) == before


def test_scores_are_shown_where_omega_says_nothing(make: Callable[..., Record]) -> None:
    record = make("deberta")
    label, values = shown_values(record)
    assert label == "gate omega"
    assert values == tuple(a.omega for a in record.adapters)
    same = tuple(dataclasses.replace(a, omega=1.0, score=float(i)) for i, a in enumerate(record.adapters))
    assert shown_values(dataclasses.replace(record, adapters=same)) == ("score (all omega equal)", tuple(range(36)))
    nothing = tuple(dataclasses.replace(a, omega=1.0) for a in record.adapters)
    assert shown_values(dataclasses.replace(record, adapters=nothing))[0] == "gate omega"
    lost = tuple(dataclasses.replace(a, omega=math.nan) for a in same)
    assert shown_values(dataclasses.replace(record, adapters=lost))[0] == "score (all omega undefined)"


def test_undefined_values_and_odd_titles_are_drawn(make: Callable[..., Record], tmp_path: Path) -> None:
    """NaN has no colour; dollar signs are no formulas; a long model name is wrapped, not cut."""
    record = gated(make("bert"), [math.nan, math.inf, *(0.1 * i for i in range(34))])
    record = dataclasses.replace(record, model=r"$\frac$ " + "long-name " * 12)
    picture = pixels(selection_map(record, tmp_path / "map.png"))
    for side in (picture[:, :6], picture[:, -6:]):
        assert side.min() == 1.0
    all_lost = gated(make("one"), [math.nan])
    assert pixels(selection_map(all_lost, tmp_path / "lost.png")).min() < 0.2


def test_a_failing_drawing_leaves_the_old_file(
    make: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = selection_map(make("one"), tmp_path / "map.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        selection_map(make("bert"), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


def test_a_run_without_adapters_has_no_picture(make: Callable[..., Record], tmp_path: Path) -> None:
    record = make(method="full", kept=(), adapters=(), n_adapters=0, k=None, r=None)
    with pytest.raises(ConfigError, match="the record of method 'full' lists no adapters"):
        selection_map(record, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_words_still_work(make: Callable[..., Record], tmp_path: Path) -> None:
    make().write(tmp_path / "record.json")
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from weightlora.report import run_summary, selection_map\n"
        "from weightlora.runs.record import Record\n"
        "record = Record.read(sys.argv[1]); run_summary(record)\n"
        "try: selection_map(record, sys.argv[1] + '.png')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "record.json")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "a picture needs matplotlib: pip install 'weightlora[report]'", done.stderr


def test_report_imports_no_torch() -> None:
    code = "import sys, weightlora.report; print(*{'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr

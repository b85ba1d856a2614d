"""The probe's picture: its numbers against numpy, its pixels against its numbers, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from tests.report.conftest import SHAPES

from weightlora.errors import ConfigError
from weightlora.report.probe_plot import DPI, SPREAD, STAR, WIDTH, Probe, probe_plot
from weightlora.report.units import mean_and_spread


def data_of(shape: str, seeds: int = 3, scale: float = 1.0) -> dict[str, Any]:
    """A probe's JSON with made-up products; the largest seventh is selected."""
    spots, rng = SHAPES[shape], random.Random(1)
    base = [scale * rng.lognormvariate(-3, 1.2) for _ in spots]
    entries = []
    for seed in range(seeds):
        products = [x * rng.uniform(0.5, 1.5) * rng.choice((-1, 1)) for x in base]
        best = sorted(range(len(spots)), key=lambda i: -abs(products[i]))[: max(1, len(spots) // 7)]
        entries.append({"seed": seed, "products": products, "selected": [spots[i][0] for i in best]})
    adapters = [{"name": name, "block": block, "kind": kind} for name, block, kind in spots]
    return {
        "adapters": adapters, "seeds": entries, "mode": "cheap", "task": "sst2", "model": shape, "steps": 100,
        "a later release": "adds keys",
    }  # fmt: skip


def amount(path: Path, colour: str) -> int:
    """How many pixels have that colour."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(image.imread(path)[..., :3] - wanted).max(axis=-1) < 1.5 / 255).sum())


@pytest.mark.parametrize("shape", ["deberta", "bert", "llama", "bart", "holes", "one"])
def test_every_shape_is_drawn_whole(tmp_path: Path, shape: str) -> None:
    path = probe_plot(Probe.from_dict(data_of(shape)), tmp_path / "probe.png")
    picture = image.imread(path)[..., :3]
    assert picture.shape[1] == round(WIDTH * DPI)
    for border in (picture[:6], picture[-6:], picture[:, :6], picture[:, -6:]):
        assert border.min() == 1.0, "something is cut off at the edge"
    assert amount(path, STAR) > 200
    assert amount(path, SPREAD) > 100


def test_each_selected_adapter_adds_a_star(tmp_path: Path) -> None:
    data = data_of("deberta", seeds=1)
    stars = []
    for count in (0, 1, 2, 6):
        data["seeds"][0]["selected"] = [adapter["name"] for adapter in data["adapters"][:count]]
        stars.append(amount(probe_plot(Probe.from_dict(data), tmp_path / f"{count}.png"), STAR))
    legend, one = stars[0], stars[1] - stars[0]
    assert legend > 100
    assert one > 100
    assert stars[2] - legend == pytest.approx(2 * one, rel=0.1)
    assert stars[3] - legend == pytest.approx(6 * one, rel=0.1)


def test_means_and_spreads_are_numpys() -> None:
    data = data_of("bert", seeds=5)
    data["seeds"][2]["products"][4] = None
    probe = Probe.from_dict(data)
    products = np.abs(np.array([entry.products for entry in probe.seeds]))
    for index in range(len(probe.adapters)):
        mean, spread = mean_and_spread(probe.magnitudes(index))
        column = products[:, index][~np.isnan(products[:, index])]
        assert mean == pytest.approx(column.mean())
        assert spread == pytest.approx(column.std(ddof=1))
    assert len(probe.magnitudes(4)) == 4
    assert probe.times_selected(0) == sum(data["adapters"][0]["name"] in e["selected"] for e in data["seeds"])


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_any_magnitude_has_a_scale(tmp_path: Path, scale: float) -> None:
    path = probe_plot(Probe.from_dict(data_of("holes", scale=scale)), tmp_path / "probe.png")
    assert image.imread(path).shape[1] == round(WIDTH * DPI)


def test_equal_probes_make_equal_bytes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    source = tmp_path / "probe.json"
    source.write_text(json.dumps(data_of("deberta")))
    one = probe_plot(Probe.read(source), tmp_path / "out" / "a.png").read_bytes()
    assert probe_plot(Probe.read(source), tmp_path / "out" / "b.png").read_bytes() == one
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_hostile_words_are_drawn_as_they_are(tmp_path: Path) -> None:
    data = data_of("holes") | {"task": r"$\undefined{$", "model": "a_b^c$"}
    for adapter in data["adapters"]:
        adapter["kind"] = rf"$\frac{adapter['kind']}"
    assert probe_plot(Probe.from_dict(data), tmp_path / "probe.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fast"}, r"'mode' is 'fast'; allowed are cheap, paper"),
        ({"adapters": []}, "no adapters or no seeds"),
        ({"seeds": []}, "no adapters or no seeds"),
        ({"seeds": [{"seed": 0, "products": [1.0], "selected": []}]}, r"1 products, but there are 36 adapters"),
        ({"seeds": [{"seed": 0, "products": [1.0] * 36, "selected": ["x"]}]}, r"selects 'x', which is not among"),
        ({"seeds": [{"seed": 0, "products": ["1.x"] * 36, "selected": []}]}, "not a probe's JSON"),
        ({"seeds": [{"seed": 0}]}, "not a probe's JSON, or it is damaged: it has no key 'seeds\\[0\\].products'"),
        ({"adapters": [{"name": "a", "block": 0, "kind": "q"}] * 2}, "names an adapter more than once"),
        ({"task": None}, "key 'task' must be text, not null"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(data_of("deberta") | change))
    with pytest.raises(ConfigError, match=message) as caught:
        Probe.read(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_no_probe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the probe .*gone"):
        Probe.read(tmp_path / "gone.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a probe's JSON"):
        Probe.read(tmp_path / "list.json")


def test_a_product_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    data = data_of("one", seeds=2)
    data["seeds"][0]["products"] = [math.inf]
    data["seeds"][1]["products"] = [None]
    probe = Probe.from_dict(data)
    assert probe.magnitudes(0) == []
    assert probe_plot(probe, tmp_path / "probe.png").is_file()

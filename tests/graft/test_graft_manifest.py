"""The manifest: whole or refused with one clear line, and only for the model it was made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.builders import lora, max_difference

from weightlora.errors import CheckpointError
from weightlora.graft.adapters import adapters
from weightlora.graft.manifest import MANIFEST, STATE, Manifest
from weightlora.graft.selection import select

TENSORS = {"omega": torch.tensor([1.0, 0.0]), "B.x": torch.randn(3, 2).T, "off": torch.tensor([], dtype=torch.int64)}


def manifest(**changes: object) -> Manifest:
    live = adapters(lora())
    chosen = select(live, [1], omegas=[1.0] * 6, scores=None, method="m", preset="paper", step=4, why="so")
    fields = {
        "stage": "final", "step": 4, "adapter": "default", "adapters": Manifest.describe(live), "selection": chosen,
        "method": {"name": "m", "k": 1}, "base": "b", "data": {"phases": [{"steps": 4}]},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"stage": "warmup", "selection": None, "data": {}}])
def test_round_trip(tmp_path: Path, changes: dict[str, object]) -> None:
    written = manifest(**changes)
    written.write(tmp_path / "new", TENSORS)
    read, tensors = Manifest.read(tmp_path / "new")
    assert read == written
    assert (
        max_difference({k: v for k, v in tensors.items() if v.numel()}, {k: TENSORS[k] for k in ("omega", "B.x")}) == 0
    )
    assert tensors["off"].shape == (0,)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted([MANIFEST, STATE])


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**data, **changes}))

    return change


def edit_selection(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        data["selection"] |= changes
        (folder / MANIFEST).write_text(json.dumps(data))

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(later="key"), "has 'later', which this release does not know"),
        (remove(MANIFEST), "not a whole checkpoint, weightlora.json is missing"),
        (remove(STATE), "not a whole checkpoint, weightlora.safetensors is missing"),
        (cut(MANIFEST), "weightlora.json is damaged"),
        (cut(STATE), "weightlora.safetensors is damaged"),
        (edit(schema_version=2), "manifest schema 2 is not supported; this release reads 1"),
        (edit(stage="middle"), "weightlora.json is damaged: key 'stage' is 'middle'"),
        (edit(step="soon"), "weightlora.json is damaged"),
        (edit(adapters=[["a", 1]]), "weightlora.json is damaged"),
        (edit(selection={"schema_version": 1}), "weightlora.json is damaged: it has no key 'selection.method'"),
        (edit_selection(schema_version=9), "selection schema 9 is not supported"),
        (edit_selection(placement={"micro_batch": 0}), "its micro_batch is 0"),
        (lambda folder: (folder / MANIFEST).write_text("null"), "weightlora.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "it has no key 'schema_version'"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "weightlora.json is damaged"),
    ],
)
def test_damaged(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    manifest().write(tmp_path, TENSORS)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")) as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint, weightlora.json is missing"):
        Manifest.read(tmp_path / "gone")


def test_the_same_model_passes() -> None:
    manifest().check_same_model(adapters(lora(seed=4)), "b")  # other weights, same structure


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: lora(layers=3), "made with 6 adapters, this model has 9"),
        (lambda: lora(rank=5), r"query \(16, 16, 4\), this model has .*query \(16, 16, 5\) \(d_in, d_out, rank\)"),
        (lambda: lora("llama"), r"made with bert\..*query \(16, 16, 4\), this model has model\.layers.*q_proj"),
        (lambda: lora(width=32), r"\(16, 16, 4\), this model has .*\(32, 32, 4\)"),
    ],
)
def test_another_model_is_named(other: Callable[[], torch.nn.Module], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"the checkpoint belongs to another model: .*{message}"):
        manifest().check_same_model(adapters(other()), "b")

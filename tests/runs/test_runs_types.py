"""What a run's settings and folders may be given as, and the one line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runs.commands import spec

from weightlora.errors import CheckpointError, ConfigError, WeightLoRAError
from weightlora.runs.run import finished, refused, resume
from weightlora.runs.serve import export_run
from weightlora.runs.spec import PARTS, RunSpec
from weightlora.tasks import load_task

WRONG: dict[str, list[Any]] = {  # by what a field declares
    "int": ["8", 8.0, True, [8], object()],
    "float": ["8", True, [8]],
    "str": [8, True, ["a"]],
    "bool": ["yes", 1],
    "dict[str, object]": ["k=3", [("k", 3)], 3],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, f.name) for kind in PARTS.values() for f in fields(kind)])
def test_every_setting_of_a_run_refuses_other_types(kind: Any, name: str) -> None:
    declared = str(next(f.type for f in fields(kind) if f.name == name))
    values = WRONG[declared.removesuffix(" | None")] + ([] if "None" in declared else [None])
    for value in values:
        with pytest.raises(ConfigError, match=f"{name}=.* is not allowed; use"):
            kind(**{name: value})


def test_numbers_of_numpy_and_paths_become_plain(tmp_path: Path) -> None:
    given = spec(
        r=np.int64(4),  # type: ignore[arg-type]
        alpha=np.float32(8),  # type: ignore[arg-type]
        seed=np.uint8(3),  # type: ignore[arg-type]
        data_dir=tmp_path,  # type: ignore[arg-type]
        settings={"k": np.int64(3)},
        training={"max_steps": np.int32(5), "learning_rate": np.float64(0.5)},
    )
    plain = spec(
        r=4,
        alpha=8.0,
        seed=3,
        data_dir=str(tmp_path),
        settings={"k": 3},
        training={"max_steps": 5, "learning_rate": 0.5},
    )
    assert given == plain
    for folder in (tmp_path, str(tmp_path)):
        given.save(folder)
        assert RunSpec.load(folder) == plain


@pytest.mark.parametrize("kind", [str, Path])
def test_run_folders_as_text_or_paths(kind: Any, tmp_path: Path) -> None:
    folder = kind(tmp_path)
    spec().save(folder)
    assert RunSpec.is_one(kind(tmp_path / "config.json"))
    assert not finished(folder)
    with pytest.raises(CheckpointError, match="holds no finished run"):
        export_run(folder, kind(tmp_path / "out"), "native")
    with pytest.raises(CheckpointError, match="is not a run directory"):
        resume(kind(tmp_path / "none"))


def test_a_damaged_type_in_a_file_is_named(tmp_path: Path) -> None:
    spec().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": "8"}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: r='8' is not allowed; use a whole number"):
        RunSpec.load(tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
def test_data_as_text_or_paths(kind: Any, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {i}", "label": i % 2}) + "\n" for i in range(40))
    (tmp_path / "sst2").mkdir()
    for name in ("train.jsonl", "sst2/train.jsonl", "sst2/validation.jsonl"):
        (tmp_path / name).write_text(rows.replace("text", "sentence") if "/" in name else rows)
    file = kind(tmp_path / "train.jsonl")
    assert len(load_task("files", train_file=file, validation_file=file).train) == 40
    assert len(load_task("sst2", data_dir=kind(tmp_path)).train) == 40


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_task("files", train_file=3),  # type: ignore[arg-type]
        lambda: load_task("files", train_file="x.csv", validation_file=["x.csv"]),  # type: ignore[arg-type]
        lambda: load_task("sst2", data_dir=True),  # type: ignore[arg-type]
    ],
)
def test_data_that_is_no_path(call: Callable[[], Any]) -> None:
    with pytest.raises(WeightLoRAError, match="is not allowed; use text or None"):
        call()


def test_a_record_says_what_differs_from_its_preset() -> None:
    for settings, label in (({}, "paper"), ({"k": 3}, "paper"), ({"score": "credit"}, "paper, changed: score")):
        config = spec(preset="paper", settings=settings)
        assert config.method.preset == "paper"
        assert refused(config, "why").preset == label

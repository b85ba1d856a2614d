"""``compare``: methods by seeds in one table, resumable, with rates tuned where no validation row is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runs.commands import TINY, read, read_rows, run_folders, spec, weightlora, write_rows

from one_budget import gathered
from weightlora.methods import METHODS
from weightlora.study.grid import Cell, Grid
from weightlora.study.jobs import execute
from weightlora.study.sweep import jobs_of

STEPS = ("--max-steps", "6", "--save-steps", "3", "--k", "3")


def compare(data: Path, out: Path, *words: object) -> int:
    return weightlora("compare", "--task", "sst2", "--data-dir", data, *TINY, *STEPS, *words, "--out", out)


def run_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of the runs below, with its size and the time of its last change."""
    tables = {"table.md", "table.json", "sweep.json"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in tables)
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def scores(folder: Path, method: str) -> list[float]:
    records = [read(run / "record.json") for run in run_folders(folder, method=method)]
    return [record["metrics"][record["metric"]] for record in records]


@pytest.mark.slow
def test_two_methods_by_two_seeds_then_nothing_is_run_again(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--methods", "top,weightlora:paper", "--seeds", "0,4", "--learning-rate", "2e-2", "--select-after", "3")
    assert compare(small_data, out, *flags) == 0
    table = read(out / "table.json")
    assert [(row["method"], row["preset"]) for row in table["rows"]] == [
        ("top", "recommended"),
        ("weightlora", "paper, changed: select_after"),
    ]
    for row, method in zip(table["rows"], ("top", "weightlora"), strict=True):
        found = scores(out, method)
        assert (row["seeds"], row["ok"], row["total"]) == ([0, 4], 2, 2)
        assert len(found) == 2
        assert row["score_mean"] == pytest.approx(np.mean(found))
        assert row["score_spread"] == pytest.approx(np.std(found, ddof=1))
        mean_and_spread = f"{np.mean(found):.4f} ± {np.std(found, ddof=1):.4f}"
        assert mean_and_spread in (out / "table.md").read_text(encoding="utf-8")
        assert mean_and_spread in capsys.readouterr().out or method != "top"
    assert [read(run / "record.json")["seed"] for run in run_folders(out, method="top")] == [0, 4]

    before = run_files(out)
    (out / "table.md").unlink()
    assert compare(small_data, out, *flags, "--json", tmp_path / "again.json") == 0
    assert run_files(out) == before
    assert read(tmp_path / "again.json") == read(out / "sweep.json")
    assert read(out / "table.json") == table
    assert (out / "table.md").is_file()

    # One run died: that one goes on, from its checkpoint, and no other.
    (died,) = run_folders(out, method="top", seed=4)
    whole = (died / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(died / "adapter")
    shutil.rmtree(died / "checkpoints" / "checkpoint-6")
    (died / "record.json").write_text(json.dumps(read(died / "record.json") | {"status": "running"}), encoding="utf-8")
    assert compare(small_data, out, *flags) == 0
    assert read(out / "table.json")["rows"][0]["score_mean"] == table["rows"][0]["score_mean"]
    assert (died / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    after = run_files(out)
    assert {name for name in before if after[name] != before[name] and died.name not in name} == set()
    assert not (died / "checkpoints" / "checkpoint-3").exists() or "checkpoint-3" in str(sorted(before))

    # Another learning rate makes other runs, and none is mixed in.
    assert compare(small_data, out, *flags, "--learning-rate", "1e-3", "--methods", "top", "--seeds", "0") == 0
    (row,) = read(out / "table.json")["rows"]
    assert (row["method"], row["seeds"]) == ("top", [0])
    assert {name: run_files(out)[name] for name in after} == after


@pytest.mark.slow
def test_a_failure_is_recorded_and_the_others_go_on(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an alpha is infinite in float32 and makes every adapter NaN; full fine-tuning has no alpha."""
    out = tmp_path / "out"
    words = ("--methods", "lora,full", "--seeds", "0,1", "--alpha", "1e45")
    assert compare(small_data, out, *words) == 1
    lora, full = read(out / "table.json")["rows"]
    assert (lora["ok"], lora["failed"], lora["total"], lora["score_mean"]) == (0, 2, 2, None)
    assert (full["ok"], full["failed"], full["total"]) == (2, 0, 2)
    assert full["score_mean"] == pytest.approx(np.mean(scores(out, "full")))
    assert "2/2" in capsys.readouterr().out
    failed = run_folders(out, method="lora")
    assert len(failed) == 2
    for run in failed:
        record = read(run / "record.json")
        assert record["status"] == "failed"
        assert record["error"]
        assert (run / "error.txt").is_file()
    # Again: what failed is tried again, what worked is not.
    worked = run_folders(out, method="full")
    before = [run_files(run) for run in worked]
    assert compare(small_data, out, *words) == 1
    assert [run_files(run) for run in worked] == before


def poisoned(data: Path, folder: Path) -> Path:
    """The same training rows, and validation rows with every label turned round and every text replaced."""
    shutil.copytree(data / "sst2", folder / "sst2")
    rows = read_rows(folder / "sst2" / "validation.jsonl")
    changed = [{**row, "sentence": f"nothing but noise {i}", "label": 1 - row["label"]} for i, row in enumerate(rows)]
    write_rows(folder / "sst2" / "validation.jsonl", changed)
    return folder


def tuning(out: Path, method: str) -> dict[float, dict[str, Any]]:
    records = [read(run / "record.json") for run in run_folders(out, "tune", method=method)]
    return {record["config"]["training"]["learning_rate"]: record for record in records}


@pytest.mark.slow
def test_tuning_takes_the_best_rate_on_held_out_training_rows(small_data: Path, tmp_path: Path) -> None:
    """Rates are multiples of each method's default. Poison in the validation rows changes no tuning score."""
    rates = ("--methods", "top,full", "--seeds", "1", "--tune", "0.1,300", "--metric", "eval_loss", "--max-steps", "8")
    clean, bad = tmp_path / "clean", tmp_path / "bad"
    assert compare(small_data, clean, *rates) == 0
    assert compare(poisoned(small_data, tmp_path / "data"), bad, *rates) == 0
    for label, default in (("top", 1e-3), ("full", 2e-4)):
        tried = tuning(clean, label)
        assert sorted(tried) == pytest.approx([0.1 * default, 300 * default])
        assert all(record["config"]["holdout"] == 0.1 for record in tried.values())
        assert {rate: record["metrics"] for rate, record in tried.items()} == {
            rate: record["metrics"] for rate, record in tuning(bad, label).items()
        }
        winner = min(tried, key=lambda rate: tried[rate]["metrics"]["eval_loss"])
        for out in (clean, bad):
            (run,) = run_folders(out, method=label)
            final = read(run / "record.json")
            assert final["config"]["training"]["learning_rate"] == winner
            assert final["config"]["holdout"] is None
        there, here = (
            read(run / "record.json")["metrics"] for out in (bad, clean) for run in run_folders(out, method=label)
        )
        assert there != here, "the poison is where the final judgement looks"
        (row,) = (row for row in gathered([clean])["rows"] if row["method"] == label)
        assert (row["learning_rate"], row["eval_loss"], row["tuned"]) == (winner, here["eval_loss"], True)


@pytest.mark.slow
def test_tuning_does_not_open_the_validation_file(small_data: Path, tmp_path: Path) -> None:
    """It is not even there: all that fails are the reported runs. A rate that destroys the model is not chosen."""
    shutil.copytree(small_data / "sst2", tmp_path / "data" / "sst2")
    (tmp_path / "data" / "sst2" / "validation.jsonl").unlink()
    cell = Cell(row="top", spec=spec(
        task="sst2", data_dir=str(tmp_path / "data"), model="bert-tiny-shape", max_length=24, method="top",
        max_steps=4, per_device_train_batch_size=8,
    ))  # fmt: skip
    grid = Grid(cells=(cell,), learning_rates=(1e-3, 1e30), seeds=(0,))
    trials, _ = jobs_of(grid, tmp_path)
    records = execute(trials, quiet=True)
    assert [record.status for record in records] == ["ok", "failed"]


def test_all_methods_are_the_default(small_data: Path, tmp_path: Path) -> None:
    """Each takes the settings that it has; that each runs is tested in ``test_runs_budget.py``."""
    words = ("--growth", "qr", "--gate-lr", "0", "--select-after", "2", "--seeds", "0")
    assert compare(small_data, tmp_path / "out", *words, "--dry-run", "--json", tmp_path / "dry.json") == 0
    cells = {cell["row"]: cell["config"] for cell in read(tmp_path / "dry.json")["cells"]}
    assert list(cells) == [name for name in METHODS if name != "zero-shot"], "a new head knows nothing untrained"
    settings = {name: cells[name]["settings"] for name in ("weightlora+", "random")}
    assert settings == {"weightlora+": {"k": 3, "growth": "qr", "gate_lr": 0.0, "select_after": 2}, "random": {"k": 3}}


@pytest.mark.slow
def test_one_that_cannot_start_stops_no_other(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is too short for one, which is a row with its reason."""
    out = tmp_path / "out"
    words = ("--methods", "gradient,weightlora+,random", "--select-after", "2", "--seeds", "0")
    assert compare(small_data, out, *words) == 1
    table = read(out / "table.json")
    rows = {row["method"]: row for row in table["rows"]}
    assert {name: (row["ok"], row["failed"], row["total"]) for name, row in rows.items()} == {
        "gradient": (0, 1, 1), "weightlora+": (1, 0, 1), "random": (1, 0, 1),
    }  # fmt: skip
    assert run_folders(out, method="gradient") == []
    (note,) = (note for note in table["notes"] if note.startswith("failed: gradient (recommended"))
    assert ", seed 0: " in note
    assert "batches=8 needs more than the 6 optimizer steps" in note
    assert "gradient cannot start: " in capsys.readouterr().err
    for name in ("weightlora+", "random"):
        kept = read(run_folders(out, method=name)[0] / "record.json")["kept"]
        assert (rows[name]["adapters_min"], rows[name]["ranks_min"]) == (len(kept), sum(one["rank"] for one in kept))


def test_a_method_that_cannot_start_is_a_row_and_can_be_mended(small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--methods", "weightlora,top", "--seeds", "0,1", "--select-after")
    assert compare(small_data, out, *words, "99") == 1
    bad, top = read(out / "table.json")["rows"]
    assert (bad["method"], bad["failed"], bad["total"], bad["score_mean"]) == ("weightlora", 2, 2, None)
    assert (top["ok"], top["total"], top["adapters_min"], top["ranks_min"]) == (2, 2, 3, 3 * 8)
    before = run_files(out)
    assert compare(small_data, out, *words, "99") == 1, "again: nothing to run, the same table"
    assert run_files(out) == before
    assert read(out / "table.json")["rows"] == [bad, top]
    assert compare(small_data, out, *words, "2") == 0
    assert {name: files for name, files in run_files(out).items() if name in before} == before


def test_what_shows_only_when_training_would_begin_is_a_row_too(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    best = ("--load-best-model-at-end", "--eval-strategy", "steps", "--eval-steps", "3")
    assert compare(small_data, out, "--methods", "weightlora:official,top", "--seeds", "0", *best) == 1
    table = read(out / "table.json")
    assert [(row["method"], row["failed"], row["ok"]) for row in table["rows"]] == [("weightlora", 1, 0), ("top", 0, 1)]
    assert any("decides only at the end" in note for note in table["notes"])
    (run,) = run_folders(out, method="weightlora")
    assert read(run / "record.json")["status"] == "failed"
    capsys.readouterr()
    # And a method for which no rate works when rates are tuned.
    assert compare(small_data, tmp_path / "tuned", "--methods", "top", "--seeds", "0,1", "--tune", "1e33") == 1
    (row,) = read(tmp_path / "tuned" / "table.json")["rows"]
    assert (row["failed"], row["total"]) == (2, 2)
    assert "no setting worked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "gradient"), "gradient: batches=8"),
        (("--methods", "gradient,top", "--k", "99"), "gradient: k=99"),
        (("--methods", "lora,top", "--data-dir", "nowhere"), "nowhere"),
        (("--methods", "lora,top", "--task", "sst3"), "sst3"),
        (("--methods", "lora,full", "--targets", "qeury"), "qeury"),
        (("--methods", "lora,full", "--micro-batch", "3"), "micro_batch=3"),
    ],
)
def test_what_hits_every_method_stops_at_once(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert compare(small_data, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_preset_flag_holds_for_methods_that_name_none(small_data: Path, tmp_path: Path) -> None:
    words = ("--methods", "weightlora,weightlora:recommended", "--preset", "paper", "--select-after", "3")
    assert compare(small_data, tmp_path / "out", *words, "--seeds", "0") == 0
    rows = read(tmp_path / "out" / "table.json")["rows"]
    assert [row["preset"] for row in rows] == ["paper, changed: select_after", "recommended, changed: select_after"]

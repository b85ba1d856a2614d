"""``sweep``: settings chosen where no reported row is seen, runs named by content, failures that stop nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runs.commands import TINY, read, spec, weightlora, write_rows

from weightlora.errors import ConfigError
from weightlora.runs.spec import RunSpec
from weightlora.study.grid import Cell, Grid, make_grid
from weightlora.study.jobs import Job, attempt, execute, run_name

SHORT = ("--max-steps", "6", "--save-steps", "3", "--k", "3", "--select-after", "2")


def sweep(data: Path, out: Path, *words: object) -> int:
    return weightlora("sweep", "--data-dir", data, *TINY, *SHORT, *words, "--out", out)


def record_files(folder: Path) -> dict[str, int]:
    """Every file of the runs, with the time of its last change."""
    found = [path for kind in ("tune", "runs") for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def records(folder: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(folder.glob("*/record.json"))]


def setting(record: dict[str, Any]) -> tuple[float, float]:
    return record["config"]["training"]["learning_rate"], record["config"]["training"]["warmup_steps"]


@pytest.mark.slow
def test_a_grid_is_tuned_on_training_rows_and_reported_on_validation_rows(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("--tasks", "sst2", "--methods", "top", "--learning-rates", "1e-3,3e-2", "--lr-warmups", "0,3")
    out = tmp_path / "out"
    assert (
        sweep(small_data, out, *grid, "--seeds", "1,2", "--selection-seeds", "7,8", "--json", tmp_path / "s.json") == 0
    )
    shown = capsys.readouterr()
    trials, finals = records(out / "tune"), records(out / "runs")
    assert (len(trials), len(finals)) == (4 * 2, 2)
    assert {record["seed"] for record in trials} == {7, 8}
    assert {json.dumps(record["scored_on"], sort_keys=True) for record in trials} == {
        '{"holdout": 0.1, "rows": 12, "split": "train", "split_seed": 0, "train_rows": 108}'
    }
    assert {json.dumps(record["scored_on"], sort_keys=True) for record in finals} == {
        '{"rows": 40, "split": "validation", "train_rows": 120}'
    }
    data = read(tmp_path / "s.json")
    assert data == read(out / "sweep.json")
    assert [(cell["row"], cell["task"]) for cell in data["cells"]] == [("top", "sst2")]
    (cell,) = data["cells"]
    means = {
        one: np.mean([r["metrics"]["accuracy"] for r in trials if setting(r) == one]) for one in map(setting, trials)
    }
    assert len(means) == 4
    best = min(one for one, mean in means.items() if mean == max(means.values()))
    assert (cell["chosen"]["learning_rate"], cell["chosen"]["warmup_steps"]) == best
    assert {setting(record) for record in finals} == {best}
    scores = [record["metrics"]["accuracy"] for record in finals]
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}" in (out / "table.md").read_text(encoding="utf-8")
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}" in shown.out
    assert "[8/8] sst2, tuning top, lr 0.03, warm-up 3, seed 8: accuracy" in shown.err

    # A larger grid takes what is there and runs the rest; a run that died goes on.
    before = record_files(out)
    died = out / "runs" / read(out / "sweep.json")["cells"][0]["runs"][0]["folder"].rpartition("/")[2]
    whole = (died / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(died / "adapter")
    shutil.rmtree(died / "checkpoints" / "checkpoint-6")
    (died / "record.json").write_text(json.dumps(read(died / "record.json") | {"status": "running"}), encoding="utf-8")
    assert sweep(small_data, out, *grid, "--seeds", "1,2,3", "--selection-seeds", "7,8") == 0
    after = record_files(out)
    assert {name for name in before if after[name] != before[name] and died.name not in name} == set()
    assert len(records(out / "tune")) == len(trials)
    assert sorted(record["seed"] for record in records(out / "runs")) == [1, 2, 3]
    assert (died / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    seam = str((died / "checkpoints" / "checkpoint-3" / "trainer_state.json").relative_to(out))
    assert after[seam] == before[seam], "it went on from its checkpoint"


@pytest.mark.slow
def test_failures_are_recorded_and_the_others_go_on(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One task is not there; one learning rate breaks every model."""
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(small_data / "sst2", data / "sst2")
    words = ("--tasks", "sst2,rte", "--methods", "top", "--learning-rates", "1e-3,1e30", "--seeds", "0")
    assert sweep(data, out, *words) == 1
    there, missing = read(out / "sweep.json")["cells"]
    assert there["chosen"] == {"learning_rate": 1e-3}
    assert [run["status"] for run in there["trials"]] == ["ok", "failed"]
    assert [run["status"] for run in there["runs"]] == ["ok"]
    assert missing["chosen"] is None
    assert missing["runs"] == []
    assert all("no such folder for task 'rte'" in run["error"] for run in missing["trials"])
    for run in missing["trials"]:
        assert read(out / run["folder"] / "record.json")["status"] == "failed"
        assert "DataError" in (out / run["folder"] / "error.txt").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "failed (2 runs): rte, top: DataError:" in " ".join(said.split())
    assert "no setting worked, nothing is reported: rte, top" in said
    # The data arrive: what failed is tried again, what worked is not.
    before = record_files(out)
    shutil.copytree(small_data / "mrpc", data / "rte")
    assert sweep(data, out, *words) == 1
    cell = read(out / "sweep.json")["cells"][1]
    assert cell["chosen"] == {"learning_rate": 1e-3}
    assert [run["status"] for run in cell["runs"]] == ["ok"]
    assert not (out / cell["trials"][0]["folder"] / "error.txt").exists()
    kept = [name for name in before if name.startswith((there["trials"][0]["folder"], there["runs"][0]["folder"]))]
    assert kept
    assert {name: record_files(out)[name] for name in kept} == {name: before[name] for name in kept}


def test_rows_of_a_recipe_have_settings_of_their_own_and_the_command_line_has_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(
        """
model: bert-tiny-shape
alpha: 16
r: 4
ranks: [2, 4]
seeds: [0, 1, 2]
learning_rates: [1e-4, 1e-3]
tasks:
  cola: {max_steps: 7}
  sst2: {max_steps: 9, alpha: 8}
methods:
  - lora
  - {name: "K = 1", method: "weightlora:paper", k: 1, alpha: 12}
  - {name: minis, method: melora, minis: 4}
reproduce: {what: is not for this command}
"""
    )

    def cells(*words: str) -> dict[tuple[str, str], dict[str, Any]]:
        assert weightlora("sweep", recipe, "--dry-run", "--json", tmp_path / "plan.json", *words) == 0
        plan = read(tmp_path / "plan.json")
        return {(cell["row"], cell["config"]["task"]): cell["config"] for cell in plan["cells"]}

    plan = cells()
    assert list(plan)[:6] == [(f"{row} r=2", task) for row in ("lora", "K = 1", "minis") for task in ("cola", "sst2")]
    assert len(plan) == 12
    lora, one, minis = plan["lora r=2", "cola"], plan["K = 1 r=4", "sst2"], plan["minis r=2", "sst2"]
    assert (lora["r"], lora["alpha"], lora["training"], lora["settings"]) == (2, 16, {"max_steps": 7}, {})
    assert (one["r"], one["alpha"], one["method"], one["preset"]) == (4, 12, "weightlora", "paper")
    assert (one["training"], one["settings"]) == ({"max_steps": 9}, {"k": 1})
    assert (minis["alpha"], minis["settings"]) == (8, {"minis": 4})
    said = capsys.readouterr().out
    assert "would run 24 runs to choose among 2 settings each, then 36 runs over seeds 0, 1, 2 in runs/sweep" in said
    changed = cells("--alpha", "3", "--methods", "random", "--k", "2", "--ranks", "8", "--max_steps", "5")
    assert {(config["alpha"], config["r"], config["method"]) for config in changed.values()} == {(3, 8, "random")}
    assert {(config["settings"]["k"], config["training"]["max_steps"]) for config in changed.values()} == {(2, 5)}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learning-rates", "1e-3,0"), "learning_rates has 0; use rates above 0"),
        (("--learning-rates", "fast"), "learning_rates='fast' is no list of numbers"),
        (("--lr-warmups", "-1"), "lr_warmups has -1"),
        (("--seeds", "1,1"), "seeds lists 1 twice"),
        (("--seeds", ""), "nothing to run"),
        (("--methods", "lora,lora"), "cells lists ('lora', 'docstrings') twice"),
        (("--methods", "lore"), "method 'lore' is unknown"),
        (("--ray-cpus", "2"), "--ray-cpus needs --ray ADDRESS"),
        (("--ray", ""), "the address of the Ray cluster is empty"),
    ],
)
def test_a_wrong_grid_is_one_line_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str
) -> None:
    assert weightlora("sweep", "--model", "bert-tiny-shape", "--out", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_wrong_lines_of_a_recipe_are_named() -> None:
    with pytest.raises(ConfigError, match="methods must list names, map each to settings"):
        make_grid({"methods": [{"name": "x"}]}, {})
    with pytest.raises(ConfigError, match="there is no setting 'speed' of task, model, method or training"):
        make_grid({"methods": [{"method": "lora", "speed": 3}]}, {})


def test_reported_rows_cannot_choose(tmp_path: Path) -> None:
    """Without a validation file the reported rows are training rows held out: the very rows that would choose."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"word {i}", "label": i % 2} for i in range(40)])
    config = spec(task="files", train_file=str(rows), method="lora")
    with pytest.raises(ConfigError, match="chosen on the rows that are reported; give a validation file"):
        Grid(cells=(Cell(row="lora", spec=config),), learning_rates=(1e-3, 1e-2))
    judged = config.but(validation_file=str(rows))
    assert Grid(cells=(Cell(row="lora", spec=judged),), learning_rates=(1e-3, 1e-2)).chooses
    assert not Grid(cells=(Cell(row="lora", spec=config),), learning_rates=(1e-3,)).chooses


CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "task": st.sampled_from(["sst2", "cola"]),
    "data_dir": st.sampled_from([None, "a", "b"]),
    "max_train_samples": st.sampled_from([None, 5, 6]),
    "holdout": st.sampled_from([None, 0.1, 0.2]),
    "split_seed": st.integers(0, 2),
    "r": st.integers(1, 3),
    "seed": st.integers(0, 2),
    "method": st.sampled_from(["lora", "weightlora"]),
    "preset": st.sampled_from(["paper", "recommended"]),
    "training": st.dictionaries(st.sampled_from(["max_steps", "learning_rate"]), st.integers(1, 3)),
}


@given(st.fixed_dictionaries({}, optional=CHANGES), st.fixed_dictionaries({}, optional=CHANGES))
def test_runs_have_one_name_exactly_if_they_are_one_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = spec(**one), spec(**other)
    assert (run_name(a) == run_name(b)) == (asdict(a) == asdict(b))
    assert run_name(a) == run_name(RunSpec.from_dict(json.loads(json.dumps(a.to_dict()))))
    assert "/" not in run_name(a)


def test_a_name_does_not_depend_on_fields_that_have_their_default() -> None:
    """What a later release adds must not rename the runs of this one: only values that were set are in the name."""
    spelled = RunSpec.of(spec(r=3).values())
    assert run_name(spelled) == run_name(spec(r=3))
    assert run_name(spec(r=3)) != run_name(spec())


def test_two_that_want_one_run_do_it_once(tmp_path: Path) -> None:
    """The second waits at the lock and reads the first one's record: even the wall times in it are the same."""
    training = {"max_steps": 8, "per_device_train_batch_size": 4}
    config = spec(
        model="bert-tiny-shape",
        method="top",
        max_length=16,
        max_train_samples=80,
        max_eval_samples=20,
        training=training,
    )
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: attempt(config, tmp_path / "run", quiet=True), range(2))
    assert one == other
    assert (one.status, [phase.steps for phase in one.phases]) == ("ok", [8])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_one_folder_cannot_hold_two_runs(tmp_path: Path) -> None:
    jobs = [Job(spec=spec(seed=seed), folder=tmp_path / "run", title="run") for seed in (0, 1)]
    with pytest.raises(ConfigError, match="asked to hold two different runs"):
        execute(jobs)
    assert list(tmp_path.iterdir()) == []

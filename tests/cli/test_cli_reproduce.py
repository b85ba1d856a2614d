"""``reproduce``: the paper's numbers beside ours, and what differs. ``--dry-run``: what would run, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, weightlora

from weightlora.runs.recipe import read_recipe
from weightlora.study.grid import make_grid
from weightlora.study.paper import TABLES, Reproduction, compared, figure, recipe_file

QUICK = ("--model", "bert-tiny-shape", "--max-length", "16", "--max-steps", "4", "--max-eval-samples", "20")


@pytest.mark.slow
def test_a_small_table_stands_beside_the_papers(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--task", "sst2,mrpc", "--methods", "lora,Full Fine-Tuning", "--scale", "small", "--seeds", "0,1")
    assert weightlora("reproduce", "table1", *words, *QUICK, "--data-dir", small_data, "--out", out) == 0
    said = capsys.readouterr().out
    data = read(out / "table1.json")
    assert [(cell["row"], cell["task"], cell["paper"]["scores"]) for cell in data["cells"]] == [
        ("Full Fine-Tuning", "sst2", [0.9541]),
        ("Full Fine-Tuning", "mrpc", [0.8848, 0.9165]),
        ("LoRA", "sst2", [0.945]),
        ("LoRA", "mrpc", [0.8897, 0.922]),
    ]
    for cell in data["cells"]:
        for run in cell["runs"]:
            assert run["metrics"] == read(out / run["folder"] / "record.json")["metrics"]
        reasons = "; ".join(cell["differs"])
        for one in (
            "model bert-tiny-shape, not microsoft/deberta-v3-base",
            "max_steps 4, not 512",
            "2 seeds, not 5",
            "learning rates 0.0005, not 5e-05,0.0005,0.005",
            "the head (with DeBERTa's pooler) trains",
        ):
            assert one in reasons
    assert "0.8897/0.9220" in said
    assert "max_steps 4, not 512" in said
    assert said.splitlines()[-1] == f"table: {out / 'table1.md'}"
    assert "0.8897/0.9220" in (out / "table1.md").read_text(encoding="utf-8")


def test_a_small_table_leaves_out_tasks_without_data(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("reproduce", "table1", "--scale", "small", "--data-dir", small_data, "--dry-run")
    assert weightlora(*words) == 0
    said = capsys.readouterr()
    assert "SKIPPED mnli, cola, qqp, qnli, rte: " in said.out + said.err
    assert {line.split(": ")[2].split(",")[0] for line in said.out.splitlines() if line.startswith("LoRA:")} == {
        "sst2", "mrpc",
    }  # fmt: skip
    assert weightlora(*words, "--task", "cola") == 0
    assert "cola" in capsys.readouterr().out


@pytest.mark.parametrize("table", TABLES)
def test_the_papers_protocol_differs_from_itself_in_nothing_but_what_always_does(table: str) -> None:
    recipe, section = read_recipe(recipe_file(table))
    made = make_grid(recipe, {})
    faster = make_grid(recipe, {"save_steps": 7, "data_dir": "here"})
    longer = make_grid(recipe, {"weight_decay": 0.5, "seeds": "3"})
    data = {"cells": [{} for _ in made.cells]}
    for other, reasons in (
        (made, []),
        (faster, []),
        (longer, ["weight_decay 0.5, not 0.01", "1 seed, not 5"]),
    ):
        with_paper = Reproduction(table=table, ours=other, papers=made, departures=section["departures"])
        for cell in compared(data, with_paper)["cells"]:
            assert cell["differs"] == [*reasons, *section["departures"]]
            assert cell["paper"]["scores"]


def test_small_keeps_the_share_of_adapters(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ("reproduce", "table6", "--scale", "small", "--dry-run", "--json", plan, "--task", "cola")
    assert weightlora(*words) == 0
    cells = read(plan)["cells"]
    assert [cell["config"]["settings"]["k"] for cell in cells] == [k / 36 for k in (1, 1, 5, 5, 10, 10)]
    assert {cell["config"]["model"] for cell in cells} == {"minilm"}
    assert weightlora(*words[:2], *words[4:], "--methods", "random") == 0
    assert [cell["config"]["settings"]["k"] for cell in read(plan)["cells"]] == [1, 5, 10]
    assert read(plan)["trials"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table9",), "'table9' is not an experiment; use one of table1, table2"),
        (("table1", "--task", "squad"), "this table has no task 'squad'; it has mnli, sst2, cola"),
        (("table1", "--methods", "dora"), "this table has no method 'dora'; it has Full Fine-Tuning, LoRA"),
        (("table1", "--scale", "tiny"), "argument --scale: invalid choice: 'tiny'"),
        ((), "the following arguments are required: EXPERIMENT"),
    ],
)
def test_what_is_not_in_the_paper_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert weightlora("reproduce", *words, "--dry-run") == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_figure_2_is_the_probe_with_the_papers_settings() -> None:
    command, settings = figure("figure2", {"data_dir": "here", "seeds": "1"}, small=False)
    assert command == "probe"
    expected = {"mode": "paper", "targets": "attention", "data_dir": "here", "seeds": "1", "max_steps": 512}
    assert expected.items() <= settings.items()
    assert figure("figure2", {}, small=False)[1]["seeds"] == [18, 52, 1917, 0, 1]
    assert figure("figure2", {}, small=True)[1]["model"] == "minilm"


def test_figure_3_is_counted_for_the_papers_ranks(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, settings = figure("figure3", {}, small=False)
    assert command == "memory"
    assert (settings["ranks"], settings["limit"]) == ("1,8,16,32,64,128,256", "16GiB")
    small = ("--scale", "small", "--data-dir", small_data, "--task", "sst2", *TINY, "--ranks", "2", "--points", "2")
    assert weightlora("reproduce", "figure3", *small, "--out", tmp_path / "f3") == 0
    assert (tmp_path / "f3" / "memory.png").stat().st_size > 0
    assert str(tmp_path / "f3" / "memory.json") in capsys.readouterr().out


@pytest.mark.slow
def test_train_dry_run_is_the_run_that_would_be(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "train",
        "--task",
        "sst2",
        "--data-dir",
        small_data,
        *TINY,
        "--method",
        "random",
        "--k",
        "3",
        "--seed",
        "5",
    )
    words += ("--max-steps", "2", "--learning-rate", "3e-3", "--out", tmp_path / "run")
    assert weightlora(*words, "--dry-run", "--json", tmp_path / "dry.json") == 0
    said = capsys.readouterr().out
    assert "random (recommended, k 3) r 8 on all-linear: sst2, bert-tiny-shape, 2 steps of 8, lr 0.003" in said
    assert not (tmp_path / "run").exists()
    assert weightlora(*words) == 0
    assert read(tmp_path / "dry.json")["config"] == read(tmp_path / "run" / "config.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "sst3"), "unknown task 'sst3'; did you mean 'sst2'?"),
        (("--task", "files"), "task 'files' needs train_file"),
        (("--model", "./nowhere"), "model './nowhere': no such folder"),
        (("--k", "0"), "k=0"),
        (("--params", "many"), "many"),
        (("--per-device-train-batch-size", "8", "--micro-batch", "3"), "micro_batch=3 does not divide"),
        (("--lr-scheduler-type", "square"), "square"),
        (("--max-steps", "0"), "the run has no step to train"),
    ],
)
def test_train_dry_run_sees_mistakes_without_weights_or_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    """The model is one that nobody could load here, so that its weights cannot have been asked for."""
    own = ("--model", "meta-llama/Meta-Llama-3-8B", "--task", "rte")
    assert weightlora("train", *own, "--dry-run", "--out", tmp_path / "run") == 0
    assert "meta-llama/Meta-Llama-3-8B, 3 epochs of 16" in capsys.readouterr().out
    assert weightlora("train", *own, *words, "--dry-run", "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_a_machine_goes_to_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora("reproduce", "table3", "--dry-run", "--task", "rte", "--json", "-") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (len(plan["cells"]), plan["trials"], plan["runs"]) == (12, 12 * 40, 12 * 5)


@pytest.mark.parametrize(("figure", "command"), [("figure2", "probe"), ("figure3", "memory")])
def test_a_figure_runs_dry(figure: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    words = ("reproduce", figure, "--dry-run", "--scale", "small", "--out", out, "--json", plan)
    assert weightlora(*words) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"would run: weightlora {command} --model minilm ")
    assert "--max-steps" in said
    assert not out.exists()
    assert read(plan)["config"]["model"] == "minilm"  # of the small scale, which has the last word
    if figure == "figure3":
        assert read(plan)["settings"]["ranks"] == "8,64"
    assert weightlora("reproduce", figure, "--dry-run", "--model", "./nowhere") == 2

"""The recipes of the paper's experiments: each is YAML, says where every value comes from, and can be run dry."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.runs.commands import read, weightlora

from weightlora.core.budget import total_params
from weightlora.runs.recipe import read_recipe
from weightlora.study.grid import Grid, make_grid
from weightlora.study.paper import FOLDER, TABLES, printed, recipe_file
from weightlora.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(FOLDER.glob("*.yaml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_table = pytest.mark.parametrize("table", TABLES)


@functools.cache
def grid(path: Path) -> Grid:
    """The grid of a recipe, as `sweep` reads it; nothing of it can be changed."""
    return make_grid(read_recipe(path)[0], {})


def test_there_is_a_recipe_for_every_experiment_and_the_root_shows_them() -> None:
    assert [path.stem for path in RECIPES] == ["figure2", "figure3", *TABLES]
    assert sorted(path.name for path in (ROOT / "recipes" / "paper").iterdir()) == sorted(
        path.name for path in FOLDER.iterdir()
    )


@each_recipe
def test_every_value_has_a_source(path: Path) -> None:
    """A comment on its line, or above it for what is indented."""
    for line in path.read_text(encoding="utf-8").partition("\nreproduce:")[0].splitlines():
        if line.strip() and not line.startswith((" ", "#")):
            assert " # " in line, f"{path.name}: no source for {line!r}"
            source = line.partition(" # ")[2]
            assert any(word in source for word in ("paper", "official", "ours", "each method", "text")), line


@each_recipe
def test_a_recipe_is_a_grid(path: Path) -> None:
    made = grid(path)
    assert made.cells
    assert len(set(made.seeds)) == (1 if path.stem == "figure3" else 5)
    for cell in made.cells:
        assert cell.spec.model.alpha / cell.spec.model.r in {32 / r for r in (1, 2, 4, 8)}
        assert cell.spec.model.dropout == 0.05


@each_recipe
def test_a_recipe_runs_dry(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = grid(path)
    missing = sorted({cell.spec.task.name for cell in made.cells} - set(TASKS))
    code = weightlora("sweep", path, "--dry-run", "--json", tmp_path / "plan.json")
    if missing:
        assert code == 2
        pytest.skip(f"NO TASK {', '.join(missing)} in this tree: the recipe of {path.stem} is parsed, not run dry")
    assert code == 0
    plan = read(tmp_path / "plan.json")
    assert len(plan["cells"]) == len(made.cells)
    assert plan["runs"] == len(made.cells) * len(made.seeds)
    assert plan["trials"] == len(made.cells) * made.combinations * made.chooses
    assert capsys.readouterr().out.count("\n") == len(made.cells) + 1


@each_table
def test_the_cells_of_a_recipe_are_those_of_the_paper(table: str) -> None:
    there = printed(table)
    made = grid(recipe_file(table))
    expected = {(row["row"], task) for row in there["rows"] for task in there["metrics"]}
    assert {(cell.row, cell.spec.task.name) for cell in made.cells} == expected


# Training rows of each task on the hub; SQuAD's and the summaries' runs are counted in epochs.
ROWS = {"mnli": 392_702, "sst2": 67_349, "cola": 8_551, "qqp": 363_846, "qnli": 104_743, "rte": 2_490, "mrpc": 3_668,
        "stsb": 5_749}  # fmt: skip


@each_table
def test_t_is_at_most_one_epoch(table: str) -> None:
    """Paper, 3.3: T "does not exceed the duration of a single epoch"."""
    seen = 0
    for cell in grid(recipe_file(table)).cells:
        if not cell.spec.method.name.startswith("weightlora"):
            continue
        seen += 1
        made: Any = cell.spec.make_method()
        training = cell.spec.training.arguments
        length = training.get("num_train_epochs")
        if length is not None:
            assert made.select_after * length <= 1, (cell.row, cell.spec.task.name)
            continue
        batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        steps = made.select_after if made.select_after >= 1 else made.select_after * training["max_steps"]
        assert steps * batch <= ROWS[cell.spec.task.name], (cell.row, cell.spec.task.name)
    assert seen


@pytest.mark.parametrize("table", ["table1", "table6"])
def test_what_departs_is_listed(table: str) -> None:
    listed = " ".join(read_recipe(recipe_file(table))[1]["departures"])
    assert "the paper's B.1 says one epoch" in listed
    for cell in grid(recipe_file(table)).cells:
        made: Any = cell.spec.make_method()
        if cell.spec.method.name == "weightlora" and made.select_after <= cell.spec.training.arguments["warmup_steps"]:
            assert f"{cell.spec.task.name.upper()} {made.select_after}".replace("COLA", "CoLA") in listed


# methods.md's reading of the printed counts: shapes (d_in, d_out) of the adapted layers of each model, in one block.
Q = (768, 768)
BLOCKS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "table1": ([Q] * 3, 12),
    "table2": ([Q] * 4 + [(3072, 768)], 12),
    "table4": ([Q] * 4 + [(3072, 768)], 12),
    "table6": ([Q] * 3, 12),
}


@pytest.mark.parametrize(("table", "blocks"), [(name, shapes) for name, (shapes, _) in BLOCKS.items()])
def test_the_number_of_adapters_gives_the_printed_parameters(table: str, blocks: list[tuple[int, int]]) -> None:
    """n as the shares have it: 36 in Table 1; 60, not the text's 72, in Tables 2 and 4."""
    shapes = blocks * BLOCKS[table][1]
    section = read_recipe(recipe_file(table))[1]
    assert section["adapters"] == len(shapes)
    rows = {row["row"]: row["params"] for row in printed(table)["rows"]}
    lora = total_params([8] * len(shapes), shapes)
    if table == "table1":
        assert rows["LoRA"] == f"{lora / 1000:.0f}K (0.24%)" == "442K (0.24%)"
        assert rows["WLoRA k=10"].startswith(f"{total_params([8] * 10, shapes[:10]) / 1000:.0f}K")
        assert rows["MELoRA"].startswith(f"{total_params([2] * 36, shapes) // 1000}K")
    elif table != "table6":
        base = 184.4e6  # DeBERTaV3-base with its head
        share = 100 * lora / (base + lora)
        assert rows["LoRA r=8"] == "0.51%"
        assert share == pytest.approx(0.51, abs=0.01)
        wrong = [*blocks[:4], (768, 3072), (3072, 768)]
        assert 100 * total_params([8] * 72, wrong * 12) / base == pytest.approx(0.71, abs=0.01)


def test_the_text_of_a_recipe_is_plain_yaml_for_other_programs() -> None:
    for path in RECIPES:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(data, dict)
        assert {"model", "targets", "seeds", "reproduce"} <= set(data)

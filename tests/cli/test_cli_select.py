"""``select``: a placement that any other trainer can use through stock PEFT. Recipes and spellings of flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.runs.commands import TINY, read, tree, weightlora

from weightlora.tasks import load_model

FLAGS = ("--max-steps", "6", "--select-after", "2")


def select(data: Path, out: Path, *words: object) -> int:
    return weightlora("select", "--task", "sst2", "--data-dir", data, *TINY, *words, "--out", out)


@pytest.mark.parametrize("method", ["weightlora", "weightlora+", "gradient", "random", "top"])
def test_stock_peft_puts_adapters_exactly_there(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    length = ("--max-steps", "10") if method == "gradient" else ("--max-steps", "6")
    own = ("--select-after", "2") if method.startswith("weightlora") else ()
    assert select(small_data, tmp_path / "chosen", "--method", method, "--k", "4", *length, *own) == 0
    selection = read(tmp_path / "chosen" / "selection.json")
    kept = [choice for choice in selection["choices"] if choice["kept"]]
    assert len(kept) == 4
    assert len(selection["choices"]) == 12
    said = capsys.readouterr().out
    assert all(choice["name"] in said for choice in kept)

    config = LoraConfig.from_pretrained(tmp_path / "chosen")
    base = load_model("bert-tiny-shape", num_labels=2).model
    model = get_peft_model(base, config)
    there = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert list(there) == [choice["name"] for choice in kept]
    for choice in kept:
        layer = there[choice["name"]]
        assert layer.r["default"] == choice["rank"]
        assert layer.scaling["default"] == pytest.approx(choice["scale"])
    assert config.task_type == "SEQ_CLS"
    assert [name for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    assert {path.name for path in (tmp_path / "chosen").iterdir()} == {
        "adapter_config.json", "selection.json", "select.json",
    }  # fmt: skip


def test_the_block_for_another_trainer(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "chosen", ("--method", "top", "--k", "4", "--max-steps", "6")
    assert select(small_data, out, *words, "--format", "trl") == 0
    said = capsys.readouterr().out
    block = said[said.index("# 4 of 12 adapters, chosen by top") :]
    assert weightlora("select", "--from", out, "--format", "trl", "--json", tmp_path / "s.json") == 0
    assert capsys.readouterr().out == block
    assert read(tmp_path / "s.json") == read(out / "selection.json")
    data = yaml.safe_load(block)
    assert data["lora_target_modules"] == [c["name"] for c in read(out / "selection.json")["choices"] if c["kept"]]
    assert (data["lora_task_type"], data["lora_modules_to_save"], data["use_peft"]) == ("SEQ_CLS", ["classifier"], True)

    assert (
        weightlora("train", "--task", "sst2", "--data-dir", small_data, *TINY, *words, "--out", tmp_path / "run") == 0
    )
    capsys.readouterr()
    assert weightlora("select", "--from", tmp_path / "run") == 0
    space: dict[str, LoraConfig] = {}
    exec(capsys.readouterr().out, space)
    ours, theirs = space["peft_config"].to_dict(), LoraConfig.from_pretrained(out).to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"target_modules", "modules_to_save"}, "lists and sets"
    assert set(ours["target_modules"]) == set(theirs["target_modules"])

    for words, told in (
        (("--from", out, "--format", "llama-factory"), "llama-factory has no setting for task_type"),
        (("--from", out, "--k", "3"), "--from trains nothing, so 'k' has no effect; drop it"),
        (("--from", tmp_path), "cannot read the selection"),
    ):
        assert weightlora("select", *words) == 2
        assert told in capsys.readouterr().err


def test_the_selection_is_the_one_that_training_would_make(small_data: Path, tmp_path: Path) -> None:
    assert select(small_data, tmp_path / "chosen", *FLAGS, "--k", "4", "--json", tmp_path / "s.json") == 0
    words = ("--task", "sst2", "--data-dir", small_data, *TINY, *FLAGS, "--k", "4")
    assert weightlora("train", *words, "--out", tmp_path / "run") == 0
    assert read(tmp_path / "chosen" / "selection.json") == read(tmp_path / "run" / "selection.json")
    assert read(tmp_path / "s.json") == read(tmp_path / "chosen" / "selection.json")


def test_a_selection_is_no_run(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chosen"
    assert select(small_data, out, "--method", "top", "--k", "2", "--max-steps", "4") == 0
    before = tree(tmp_path)
    capsys.readouterr()
    for words in (("resume", out), ("export", out)):
        assert weightlora(*words) == 2
        assert "is not a run directory" in capsys.readouterr().err
    assert select(small_data, out, "--method", "top", "--k", "3", "--max-steps", "4") == 2
    assert "already holds a selection" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert select(small_data, out, "--method", "top", "--k", "3", "--max-steps", "4", "--overwrite") == 0
    assert len(LoraConfig.from_pretrained(out).target_modules) == 3


@pytest.fixture
def recipe(small_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"task: sst2\ndata_dir: {small_data}\nmodel: bert-tiny-shape\nmax-length: 24\nmethod: top\nk: 2\n"
        "max_steps: 4\nlearning_rate: 1e-3\nper_device_train_batch_size: 8\ntargets: [query, value]\n"
        "overwrite: false\nregression: false\ndataloader_pin_memory: false\nholdout: null\n"
        "lr_scheduler_kwargs: {}\nseed: 5\n",
        encoding="utf-8",
    )
    return path


def config_of(run: Path) -> dict[str, object]:
    config: dict[str, object] = read(run / "config.json")
    return config


def test_a_recipe_holds_the_flags_and_the_command_line_has_the_last_word(recipe: Path, tmp_path: Path) -> None:
    assert weightlora("train", recipe, "--out", tmp_path / "a") == 0
    assert weightlora("train", recipe, "--k", "3", "--learning-rate=0.02", "--seed", "6", "--out", tmp_path / "b") == 0
    a, b = config_of(tmp_path / "a"), config_of(tmp_path / "b")
    assert (a["method"], a["settings"], a["seed"], a["targets"]) == ("top", {"k": 2}, 5, "query,value")
    assert isinstance(a["training"], dict)
    assert isinstance(b["training"], dict)
    assert (a["training"]["learning_rate"], a["training"]["max_steps"]) == (1e-3, 4)
    assert a["training"]["dataloader_pin_memory"] is False
    assert (b["settings"], b["seed"], b["training"]["learning_rate"]) == ({"k": 3}, 6, 0.02)
    differing = {key for key in a if a[key] != b[key]}
    assert differing == {"settings", "seed", "training"}
    assert read(tmp_path / "a" / "record.json")["n_adapters"] == 4


def test_both_spellings_of_a_flag_are_one(small_data: Path, tmp_path: Path) -> None:
    dashes = ["--data-dir", small_data, "--max-length", "24", "--max-steps", "4", "--per-device-train-batch-size", "8"]
    underlined = [
        str(word).replace("-", "_").replace("__", "--") if str(word).startswith("--") else word for word in dashes
    ]
    assert underlined[0] == "--data_dir"
    for name, words in (("a", dashes), ("b", underlined)):
        rest = ["--task", "sst2", "--model", "bert-tiny-shape", "--method", "random", "--k=2"]
        assert weightlora("train", *words, *rest, "--out", tmp_path / name) == 0
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


@pytest.mark.parametrize("command", ["train", "select", "compare", "export"])
def test_json_on_standard_output_is_all_there_is(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    words: list[object] = [command, recipe, "--json", "-", "--out", out]
    if command == "export":
        assert weightlora("train", recipe, "--out", tmp_path / "run") == 0
        words[1] = tmp_path / "run"
    if command == "compare":
        text = "".join(
            line for line in recipe.read_text().splitlines(True) if not line.startswith(("method:", "overwrite:"))
        )
        recipe.write_text(text + "methods: [top, random]\nseeds: 0\n")
    capsys.readouterr()
    assert weightlora(*words) == 0
    data = json.loads(capsys.readouterr().out)
    files = {"train": "record.json", "select": "selection.json", "compare": "sweep.json"}
    if command == "export":
        assert data["path"] == str(out)
        assert data["max_difference"] <= data["tolerance"]
    else:
        assert data == read(out / files[command])


@pytest.mark.parametrize("profile", ["native", "portable", "dense", "merged"])
def test_export_by_profile_goes_below_the_run_unless_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], profile: str
) -> None:
    assert weightlora("train", recipe, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert weightlora("export", tmp_path / "run", "--profile", profile) == 0
    said = capsys.readouterr().out
    assert f"{profile} export: {tmp_path / 'run' / profile}" in said
    assert read(tmp_path / "run" / profile / "export.json")["profile"] == profile
    assert weightlora("export", tmp_path / "run", "--profile", profile) == 0, "an earlier export may be replaced"
    assert read(tmp_path / "run" / "record.json")["status"] == "ok"

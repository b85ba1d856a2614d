"""One budget of adapter parameters for every method, and what the record says became of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from tests.builders import long
from tests.runs.commands import TINY, read, run_folders, weightlora

from weightlora.methods import METHODS, PlainMethod, TunerMethod
from weightlora.runs.build import base_model
from weightlora.runs.spec import RunSpec
from weightlora.tasks import read_task

ASKED = 8000
FLAGS = ("--params", "8k", "--max-steps", "16", "--select-after", "4", "--save-strategy", "no")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "first"), [*long(("sst2", 0)), ("stsb", 1), *long(("sst2", 2))])
def test_every_method_runs_within_one_budget(task: str, first: int, small_data: Path, tmp_path: Path) -> None:
    """A third of the methods each time, one of the thirds on numbers."""
    out = tmp_path / "all"
    # A new head knows nothing untrained. Placements spend their budget in tests/methods/test_placements.py.
    kinds = [(name, kind) for name, kind in METHODS.items() if kind.learns and "placements" not in kind.__module__]
    there = dict(kinds[first::3])
    code = weightlora(
        "compare", "--methods", ",".join(there), "--seeds", "0", "--task", task, "--data-dir", small_data, *TINY,
        *FLAGS, "--out", out,
    )  # fmt: skip
    table = read(out / "table.json")
    assert code == 0, table["notes"]
    assert [row["method"] for row in table["rows"]] == list(there)
    for name, kind in there.items():
        (folder,) = run_folders(out, method=name)
        record = read(folder / "record.json")
        assert record["status"] == "ok", name
        by_memory = name == "weightlora+"  # what lives is what fits; weightlora's K follows from the parameters
        assert (record["k"] is None) == (kind.chooses_k or issubclass(kind, PlainMethod) or by_memory), name
        budget = record["budget"]
        if issubclass(kind, PlainMethod):
            assert budget == {}
            continue
        assert budget["asked"] == ASKED
        assert 0 < budget["effective"] <= ASKED, name
        assert budget["trainable"] <= budget["allocated"], name
        assert max(budget["effective"], 1) <= budget["peak"], name  # survivors of some methods grow after the seam
        spent = budget["effective"] >= 0.95 * ASKED and budget["peak"] <= 1.05 * ASKED
        assert spent == (record["unmet"] == ""), name
        assert budget["stored_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        run = RunSpec.load(folder)
        stock = PeftModel.from_pretrained(
            base_model(run, read_task(run.task, run.model.name)).model, folder / "adapter"
        )
        assert stock.peft_config["default"].peft_type == {"VERA": "VERA", "VBLORA": "VBLORA"}.get(
            kind.kind if issubclass(kind, TunerMethod) else "", "LORA"
        )


def test_a_budget_that_cannot_be_met_says_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, message in (("lora", "too few for"), ("random", "too few for the largest adapter at rank 8")):
        assert weightlora("train", "--method", method, *TINY, "--params", "9", "--out", tmp_path / method) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / method).exists()
    assert weightlora("train", *TINY, "--params", "many", "--out", tmp_path / "x") == 2
    assert "'many' is not a number of parameters" in capsys.readouterr().err


def test_the_budget_changes_the_rank_and_not_the_scale(tmp_path: Path, small_data: Path) -> None:
    words = ("--task", "sst2", "--data-dir", small_data, *TINY, "--max-steps", "2", "--method", "lora")
    assert weightlora("train", *words, "--params", "8k", "--out", tmp_path / "a") == 0
    config = read(tmp_path / "a" / "adapter" / "adapter_config.json")
    assert config["r"] == 4
    assert config["lora_alpha"] / config["r"] == 32 / 8

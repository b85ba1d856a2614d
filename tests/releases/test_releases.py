"""What earlier releases left on disk is loaded, resumed, exported and shown by this one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, load_model
from tests.builders import adapter_state, base, batch, lora, max_difference
from tests.releases.make import COMMAND, HERE, METHOD, stored_trainer
from tests.runs.commands import weightlora

from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.selection import Selection
from weightlora.runs.record import Record
from weightlora.training import fit

RELEASES = sorted(path.name for path in HERE.iterdir() if (path / "model.safetensors").is_file())
FROM = ["checkpoint-3", "checkpoint-4", "seam-4", "checkpoint-6", "checkpoint-8"]
# Another torch or Transformers may round otherwise; eight steps of Adam at 1e-2 carry that on.
ROUNDED = 1e-4


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what one release wrote."""
    return Path(shutil.copytree(HERE / request.param, tmp_path / request.param))


def test_there_is_one() -> None:
    assert "0.2.0" in RELEASES


@pytest.mark.parametrize("name", FROM)
def test_a_checkpoint_goes_on_to_the_same_end(release: Path, name: str) -> None:
    trainer = stored_trainer(release / "fit", release / "model.safetensors")
    result = fit(trainer, METHOD, resume=release / "fit" / name, measure=False)
    assert trainer.state.global_step == 8
    expected = Selection.load(release / "adapter" / "selection.json")
    assert result.selection is not None
    assert [(c.name, c.kept, c.rank) for c in result.selection.choices] == [
        (c.name, c.kept, c.rank) for c in expected.choices
    ]
    export(result, release / "again")
    ends = [load_file(release / folder / "adapter_model.safetensors") for folder in ("again", "adapter")]
    assert max_difference(*ends) < ROUNDED


def test_stock_peft_opens_the_adapter(release: Path) -> None:
    whole = lora(dropout=0.0)
    load_model(whole, release / "model.safetensors")
    plain = base("bert", dropout=0.0)
    plain.load_state_dict(whole.merge_and_unload().state_dict())  # type: ignore[operator]  # B is 0: it is the base
    model = PeftModel.from_pretrained(plain, release / "adapter")
    kept = Selection.load(release / "adapter" / "selection.json").kept
    assert [(a.name, a.rank) for a in adapters(model)] == [(choice.name, choice.rank) for choice in kept]
    with torch.no_grad():
        answer = model(**batch()).logits
        with model.disable_adapter():
            assert not torch.allclose(model(**batch()).logits, answer, atol=1e-3)
    stored = load_file(release / "adapter" / "adapter_model.safetensors")
    assert sum("lora_B" in key for key in stored) == sum("lora_B" in key for key in adapter_state(model)) == 2


def test_a_killed_command_goes_on(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(release)  # its rows are named by relative paths
    assert Record.read(Path("killed/record.json")).status == "running"
    assert weightlora("resume", "killed") == 0
    ends = [load_file(Path(run) / "adapter" / "adapter_model.safetensors") for run in ("killed", "whole")]
    assert max_difference(*ends) < ROUNDED
    assert [a.name for a in Record.read(Path("killed/record.json")).kept] == [
        a.name for a in Record.read(Path("whole/record.json")).kept
    ]


def test_a_finished_run_is_read(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(release)
    assert Record.read(Path("whole/record.json")).status == "ok"
    assert weightlora("report", "whole", "--out", "page.html") == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert Selection.load(Path("whole/selection.json")).kept[0].name in page
    # The same command finds it done; nothing is trained again.
    capsys.readouterr()
    assert weightlora(*COMMAND, "--out", "whole") == 2
    assert "holds a finished run" in capsys.readouterr().err

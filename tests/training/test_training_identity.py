"""A folder holds the checkpoints of one run; resuming means that one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, base, lora, max_difference, trainer

from weightlora.errors import CheckpointError, ConfigError
from weightlora.methods import DoRA, FullFineTuning, LoRA, Method, WeightLoRA
from weightlora.training import fit
from weightlora.training.checkpoint import folders, seal
from weightlora.training.identity import IN_USE, RUN

METHODS: dict[str, Method] = {"weightlora": WeightLoRA(k=2, select_after=3), "dora": DoRA(), "full": FullFineTuning()}


def model(name: str, seed: int = 0) -> Any:
    if name == "full":
        return base("bert", 1, seed=seed)
    return lora(layers=1, seed=seed, use_dora=name == "dora")


def run(
    out: Path, name: str, resume: Any = False, *, steps: int = 6, seed: int = 0, rate: float = 1e-2, **given: Any
) -> Any:
    made = trainer(
        out, model(name, seed), steps=steps, save_strategy="steps", save_steps=2, logging_steps=6, learning_rate=rate
    )
    fit(made, METHODS[name], resume=resume, measure=False, **given)
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    return adapter_state(made.model) or {k: v.clone() for k, v in made.model.state_dict().items()}


def ids(out: Path) -> set[str]:
    files = (out / IN_USE, *(folder / RUN for folder in folders(out)))
    return {json.loads(file.read_text())["id"] for file in files}


def contents(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind."""
    found = {}
    for name in METHODS:
        found[name] = tmp_path_factory.mktemp(name)
        run(found[name], name)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_used_folder_is_refused_or_cleared_on_a_word(name: str, old: dict[str, Path], tmp_path: Path) -> None:
    """Then what is resumed there is the new run, never the old one, which had got further."""
    out = tmp_path / "run"
    shutil.copytree(old[name], out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"another run \(checkpoint-2\).*overwrite=True.*resume=True") as caught:
        run(out, name, rate=1e-3)
    assert "\n" not in str(caught.value)
    assert contents(out) == before
    done = run(out, name, rate=1e-3, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(ids(out)) == 1
    assert ids(out) != ids(old[name])
    shutil.rmtree(out / "checkpoint-6")
    again = run(out, name, True, rate=1e-3)
    assert max_difference(weights(again), weights(done)) == 0.0
    assert len(ids(out)) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_another_run_is_refused_by_name(name: str, old: dict[str, Path], tmp_path: Path) -> None:
    """It was copied into the folder, and is the furthest there."""
    out = tmp_path / "run"
    run(out, name, rate=1e-3)
    shutil.rmtree(out / "checkpoint-6")
    shutil.copytree(old[name] / "checkpoint-6", out / "checkpoint-6")
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 belongs to another run than .*; remove it"):
        run(out, name, True, rate=1e-3)
    assert contents(out) == before


@pytest.mark.parametrize("name", METHODS)
def test_another_length_or_base_is_refused(name: str, old: dict[str, Path], tmp_path: Path) -> None:
    before = contents(old[name])
    with pytest.raises(CheckpointError, match="is of a run of 6 steps, this one has 8; resume with max_steps=6"):
        run(old[name], name, True, steps=8)
    if name != "full":  # which loads every weight
        with pytest.raises(CheckpointError, match="another base model"):
            run(old[name], name, True, seed=1)
    assert contents(old[name]) == before


def test_another_plain_method_is_refused(old: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(old["dora"], out)
    made = trainer(out, lora(layers=1), steps=6)
    with pytest.raises(CheckpointError):
        fit(made, LoRA(), resume=True, measure=False)
    with pytest.raises(CheckpointError, match=r"was made with .*; resume with the same method"):
        fit(trainer(out, base("bert", 1), steps=6), FullFineTuning(), resume=True, measure=False)


def test_a_checkpoint_named_by_path_goes_on_elsewhere(old: dict[str, Path], tmp_path: Path) -> None:
    """It takes its id along; a folder that another run uses is refused, or cleared of that run's alone."""
    start = old["weightlora"] / "checkpoint-2"
    run(tmp_path / "empty", "weightlora", start)
    assert ids(tmp_path / "empty") == ids(old["weightlora"])
    run(tmp_path / "used", "weightlora", rate=1e-3)
    with pytest.raises(CheckpointError, match=r"holds checkpoints of another run \(checkpoint-2\)"):
        run(tmp_path / "used", "weightlora", start)
    run(tmp_path / "used", "weightlora", start, overwrite=True)
    assert ids(tmp_path / "used") == ids(old["weightlora"])
    with pytest.raises(ConfigError, match="resume=True goes on with the run that overwrite=True removes"):
        run(tmp_path / "used", "weightlora", True, overwrite=True)


def test_ids_differ_and_draw_nothing(tmp_path: Path) -> None:
    """Two runs with one seed have different ids; no seeded generator is asked."""
    from weightlora.training.identity import Run

    net = model("weightlora")
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    one, other = Run.new(METHODS["weightlora"], net), Run.new(METHODS["weightlora"], net)
    assert one.id != other.id
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(("method", "active"), [
    (METHODS["weightlora"], "mine"), (METHODS["weightlora"], "other"), (METHODS["dora"], "mine"),
], ids=["weightlora", "another", "dora"])  # fmt: skip
def test_a_named_adapters_folder_is_under_the_seal(method: Method, active: str, tmp_path: Path) -> None:
    """PEFT writes it into a folder of its own, and loads it from there."""
    from safetensors.torch import load_file, save_file

    def named() -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["query", "value"], use_dora=method.name == "dora")
        torch.manual_seed(0)
        made: Any = get_peft_model(base("bert", 1), config, adapter_name="mine")
        if method.name != "dora":
            made.add_adapter("other", LoraConfig(r=2, target_modules=["query", "value"]))
            made.set_adapter(active)
        return made

    settings: Any = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    done: Any = trainer(tmp_path, named(), **settings)
    fit(done, method, measure=False)
    altered = tmp_path / "checkpoint-6" / active / "adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(altered).items()}, altered, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"checkpoint-6/{active}/adapter_model.safetensors is damaged"):
        fit(trainer(tmp_path, named(), **settings), method, resume=altered.parents[1], measure=False)
    again: Any = trainer(tmp_path, named(), **settings)
    fit(again, method, resume=True, measure=False)
    assert max_difference(adapter_state(again.model), adapter_state(done.model)) == 0.0


def test_a_file_that_came_later_breaks_the_seal(tmp_path: Path) -> None:
    from weightlora.training.checkpoint import damage

    (tmp_path / "mine").mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    seal(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "mine" / "more.json").write_text("{}")
    assert damage(tmp_path) == "mine/more.json is damaged: it is not the file that was saved"


@pytest.mark.parametrize("further", [False, True])
def test_a_plain_trainers_checkpoint_is_never_removed(further: bool, old: dict[str, Path], tmp_path: Path) -> None:
    """It has no manifest, as a half-written checkpoint of ours may have none; but it is whole, and not ours."""
    out = tmp_path / "out"
    shutil.copytree(old["weightlora"], out)
    made = trainer(out, lora(layers=1), steps=8, save_strategy="steps", save_steps=8)
    made.train()
    if not further:
        shutil.rmtree(out / "checkpoint-8")
        shutil.copytree(out / "checkpoint-6", out / "checkpoint-7")  # as a process leaves it that dies while it saves
        (out / "checkpoint-7" / "trainer_state.json").unlink()
        run(out, "weightlora", resume=True)
        assert not (out / "checkpoint-7").exists()
        return
    with pytest.raises(CheckpointError, match=r"checkpoint-8 is the checkpoint of a trainer without a method"):
        run(out, "weightlora", resume=True)
    assert (out / "checkpoint-8" / "trainer_state.json").is_file()

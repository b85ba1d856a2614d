"""The best checkpoint of a resumed run is looked for beside the others, whatever their files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, base, lora, max_difference, trainer

from weightlora.errors import CheckpointError
from weightlora.methods import FullFineTuning, LoRA, Method, WeightLoRA
from weightlora.training import fit
from weightlora.training.checkpoint import SEAL, damage, folders, resolve, seal

METHODS: dict[str, Method] = {"weightlora": WeightLoRA(k=2, select_after=3), "lora": LoRA(), "full": FullFineTuning()}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
              "metric_for_best_model": "nearness", "greater_is_better": True}  # fmt: skip
BEST = 5


def run(out: Path, name: str, resume: Any = False, load_best: bool = True) -> Any:
    """Eight steps; the fifth is the best."""
    model = base("bert") if name == "full" else lora()
    made = trainer(out, model, steps=8, load_best_model_at_end=load_best, **EVERY_STEP)
    made.compute_metrics = lambda _: {"nearness": -abs(made.state.global_step - BEST)}
    fit(made, METHODS[name], resume=resume, measure=False)
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    return adapter_state(made.model) or {k: v.clone() for k, v in made.model.state_dict().items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Per method: a finished run, and the weights of its best step."""
    found = {}
    for name in METHODS:
        out = tmp_path_factory.mktemp(name)
        made = run(out, name)
        assert made.state.best_model_checkpoint == str(out / f"checkpoint-{BEST}")
        found[name] = out, weights(made)
    return found


def stopped(done: Path, out: Path, step: int) -> Path:
    """A copy of a run that was stopped after `step`."""
    shutil.copytree(done, out)
    for folder in folders(out):
        if int(folder.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(folder)
    return out / f"checkpoint-{step}"


def say(folder: Path, *, sealed: bool, **entries: Any) -> None:
    """Write other entries into a checkpoint's state."""
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    seal(folder) if sealed else (folder / SEAL).unlink()


def named(best: Path) -> dict[str, Any]:
    """The best checkpoint by its path alone: from a step the trainer would make the path anew when it saves."""
    return {"best_model_checkpoint": str(best), "best_global_step": None}


@pytest.mark.parametrize("step", [7, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_moved(name: str, step: int, done: Any, tmp_path: Path) -> None:
    """The state still names the old place, which is gone; the best is found in the new one."""
    whole, expected = done[name]
    here = stopped(whole, tmp_path / "moved", step)
    say(here, sealed=True, **named(tmp_path / "gone" / f"checkpoint-{BEST}"))
    made = run(here.parent, name, resume=True)
    assert made.state.best_model_checkpoint == str(here.parent / f"checkpoint-{BEST}")
    assert max_difference(weights(made), expected) == 0.0


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("step", [7, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_that_leads_elsewhere(name: str, step: int, sealed: bool, done: Any, tmp_path: Path) -> None:
    """Another run's weights lie where the state points; they are not loaded."""
    whole, expected = done[name]
    here = stopped(whole, tmp_path / "run", step)
    trap = shutil.copytree(whole / "checkpoint-7", tmp_path / "trap" / f"checkpoint-{BEST}")
    say(here, sealed=sealed, **named(trap))
    made = run(here.parent, name, resume=True)
    assert max_difference(weights(made), expected) == 0.0


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("step", [7, 8])
def test_a_best_that_cannot_be_loaded(how: str, step: int, done: Any, tmp_path: Path) -> None:
    """Told before the first step when it is to be loaded at the end; of no matter otherwise."""
    whole, _ = done["weightlora"]
    here = stopped(whole, tmp_path / "run", step)
    folder = here.parent / f"checkpoint-{BEST}"
    if how == "missing":
        shutil.rmtree(folder)
    else:
        (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"checkpoint-{BEST} is the best .*{how}.*restore it, or") as caught:
        run(here.parent, "weightlora", resume=here)
    assert "\n" not in str(caught.value)
    expected = weights(run(tmp_path / "whole", "weightlora", load_best=False))
    made = run(here.parent, "weightlora", resume=here, load_best=False)
    assert max_difference(weights(made), expected) == 0.0


LEADING_OUT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a folder that is no checkpoint": lambda out: {"best_model_checkpoint": str(out / "elsewhere")},
    "upwards": lambda out: {"best_model_checkpoint": f"{out}/checkpoint-5/.."},
    "a list": lambda out: {"best_model_checkpoint": [str(out)]},
    "a step that is a path": lambda out: {"best_global_step": "5/../../elsewhere"},
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("what", LEADING_OUT)
def test_what_names_no_checkpoint_is_damage(what: str, sealed: bool, done: Any, tmp_path: Path) -> None:
    here = stopped(done["weightlora"][0], tmp_path / "run", 7)
    say(here, sealed=sealed, **LEADING_OUT[what](tmp_path))
    with pytest.raises(CheckpointError, match=r"trainer_state.json is damaged: best_.*; .*checkpoint-6 is whole"):
        resolve(here, here.parent)
    assert resolve(True, here.parent) == here.parent / "checkpoint-6"


@pytest.mark.parametrize("shard", ["../other.safetensors", "/other.safetensors", "..", "a\\b.safetensors", 3])
def test_shards_lie_beside_their_index(shard: Any, done: Any, tmp_path: Path) -> None:
    """A model in several files: its index names files of the same folder only."""
    here = stopped(done["full"][0], tmp_path / "run", 7)
    index = here / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors"}}))
    seal(here)
    assert damage(here) is None
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    seal(here)
    assert "is no file beside it" in str(damage(here))
    index.write_text("[]")
    seal(here)
    assert damage(here) == "model.safetensors.index.json is damaged"

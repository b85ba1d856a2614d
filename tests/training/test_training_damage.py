"""Whatever happens to one file of a checkpoint, the run ends with the same adapter or says what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, lora, max_difference, trainer

from weightlora.errors import CheckpointError
from weightlora.methods import WeightLoRA
from weightlora.training import fit
from weightlora.training.checkpoint import SEAL, damage, folders, resolve
from weightlora.training.results import read_progress

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "checksums.json", "optimizer.pt",
         "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", "weightlora.json",
         "weightlora.safetensors", "weightlora_run.json")  # fmt: skip
METHOD = WeightLoRA.from_preset("paper", k=2, select_after=4)
DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "missing": lambda file, other: file.unlink(),
    "empty": lambda file, other: file.write_bytes(b""),
    "truncated": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file, other: file.write_bytes(bytes(range(256)) * 9),
    "foreign": lambda file, other: shutil.copy(other, file),
}


def run(out: Path, resume: Any = False, steps: int = 8, **arguments: Any) -> Any:
    made = trainer(out, arguments.pop("model", None), **{"steps": steps, "save_strategy": "steps", "save_steps": 3,
                                                        **arguments})  # fmt: skip
    fit(made, METHOD, resume=resume, measure=False)
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A finished run of 8 steps, another one with other weights and data order, and what the first came to."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    done = run(one)
    run(other, seed=1, data_seed=1, model=lora(seed=3))
    return one, other, adapter_state(done.model)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("which", ["checkpoint-3", "seam-4", "checkpoint-6"])
def test_every_file_and_every_damage_is_seen(
    runs: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, which: str, name: str, how: str
) -> None:
    """The checkpoint is passed over, unless the file is the seal itself and gone: then the rest is as it was."""
    one, other, _ = runs
    shutil.copytree(one, tmp_path / "run")
    folder = tmp_path / "run" / which
    before = (folder / name).read_bytes()
    DAMAGE[how](folder / name, other / which / name)
    same = (folder / name).is_file() and (folder / name).read_bytes() == before
    for later in folders(tmp_path / "run"):
        if int(later.name.rsplit("-", 1)[1]) > int(which.rsplit("-", 1)[1]):
            shutil.rmtree(later)
    earlier = {"checkpoint-3": None, "seam-4": "checkpoint-4", "checkpoint-6": "seam-4"}[which]
    if same or (name == SEAL and how == "missing"):
        assert resolve(True, tmp_path / "run") == folder
    elif earlier is not None:
        assert resolve(True, tmp_path / "run") == tmp_path / "run" / earlier
        with pytest.raises(CheckpointError, match=f"{which}.*; .*{earlier} is whole") as caught:
            resolve(folder, tmp_path / "run")
        assert "\n" not in str(caught.value)
    else:
        # A seal of another checkpoint fits none of the files; the first one is named.
        told = "is not the file that was saved" if name == SEAL and how == "foreign" else name
        with pytest.raises(CheckpointError, match=f"can be used: checkpoint-3: .*{told}"):
            resolve(True, tmp_path / "run")


@pytest.mark.parametrize(("which", "name"), [("checkpoint-6", "optimizer.pt"), ("seam-4", "adapter_model.safetensors")])
def test_it_goes_on_from_an_earlier_one_to_the_same_adapter(
    runs: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, which: str, name: str
) -> None:
    one, _, expected = runs
    shutil.copytree(one, tmp_path / "run")
    for later in folders(tmp_path / "run"):
        if int(later.name.rsplit("-", 1)[1]) > int(which.rsplit("-", 1)[1]):
            shutil.rmtree(later)
    DAMAGE["truncated"](tmp_path / "run" / which / name, tmp_path)
    assert max_difference(adapter_state(run(tmp_path / "run", resume=True).model), expected) == 0.0
    assert damage(tmp_path / "run" / which) is None


def test_another_base_of_the_same_shape(runs: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    with pytest.raises(CheckpointError, match="belongs to another base model of the same shape"):
        run(tmp_path / "run", resume=True, model=lora(seed=3))
    other: Any = lora()
    other.config.hidden_act = other.base_model.model.config.hidden_act = "relu"
    with pytest.raises(CheckpointError, match="belongs to another base model of the same shape"):
        run(tmp_path / "run", resume=True, model=other)


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare"])
@pytest.mark.parametrize("name", FILES)
def test_code_in_a_checkpoint_is_never_run(
    runs: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, name: str, legacy: bool, sealed: bool
) -> None:
    """In the place of any file, under a seal that fits; the folder that the code would make is not there afterwards."""
    from weightlora.training.checkpoint import seal

    folder = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(runs[0] / "checkpoint-6", folder)
    trap = tmp_path / "executed"
    torch.save(Evil(trap), folder / name, _use_new_zipfile_serialization=not legacy)
    if sealed and name != SEAL:
        seal(folder)
    elif name != SEAL:
        (folder / SEAL).unlink()
    if name in ("README.md", "training_args.bin"):  # read by nobody
        assert json.loads((folder / "weightlora.json").read_text())["step"] == 6
        resolve(folder, tmp_path / "run")
    else:
        with pytest.raises(CheckpointError) as caught:
            run(tmp_path / "run", resume=folder)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize(("name", "value"), [("seconds", None), ("steps", -1), ("flops_per_step", 2**63)])
def test_a_manifest_with_a_number_that_no_phase_has_is_damaged(name: str, value: Any) -> None:
    phase = {"name": "warmup", "steps": 3, "seconds": 1.0, "micro_batch": 4, "accumulation": 1, "trainable_params": 9,
             "kept_activation_bytes": 8, "flops_per_step": 7, "peak_memory_bytes": None}  # fmt: skip
    assert read_progress({"phases": [phase], "seconds": 2.0}, Path("here"))[0] == 2.0
    with pytest.raises(CheckpointError, match="here: the manifest is damaged"):
        read_progress({"phases": [phase | {name: value}], "seconds": 2.0}, Path("here"))

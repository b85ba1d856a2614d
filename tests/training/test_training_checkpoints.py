"""Stopped anywhere and resumed, a run ends where the uninterrupted one does; what is not whole is not resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import a_third, adapter_state, long, lora, max_difference, pairs, trainer
from torch import nn
from transformers import Trainer

from weightlora.errors import CheckpointError
from weightlora.graft.adapters import adapters
from weightlora.methods import (
    DeepestAdapters,
    DoRA,
    LoRA,
    Method,
    OneShotGradient,
    RandomAdapters,
    WeightLoRA,
    WeightLoRAPlus,
)
from weightlora.training import FitResult, fit
from weightlora.training.checkpoint import SEAL, latest, resolve, whole
from weightlora.training.identity import IN_USE

METHODS: dict[str, Method] = {
    "weightlora": WeightLoRA(k=2, select_after=5),
    "weightlora-paper": WeightLoRA.from_preset("paper", k=2, select_after=5),
    "weightlora-official": WeightLoRA.from_preset("official", k=2),
    "weightlora-cubic": WeightLoRA.from_preset(
        "paper", k=2, select_after=5, k_schedule="cubic", score="credit", coverage=True
    ),
    "weightlora-trapezoid": WeightLoRA(k=2, select_after=5, score="trapezoid"),
    "weightlora-cross": WeightLoRA(k=2, select_after=5, score="cross-gradient"),
    "weightlora+": WeightLoRAPlus(k=2, select_after=5),
    "weightlora+qr": WeightLoRAPlus.from_preset("paper", k=2, select_after=5, remainder="top"),
    "lora": LoRA(),
    "random": RandomAdapters(k=2),
    "top": DeepestAdapters(k=2),
    "gradient": OneShotGradient(k=2, batches=3),
}


def run(out: Path, method: Method, resume: Any = False, **arguments: Any) -> tuple[Trainer, FitResult]:
    made = trainer(out, arguments.pop("model", None), **{"save_strategy": "steps", "save_steps": 3, **arguments})
    return made, fit(made, method, resume=resume, measure=False)


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.name != IN_USE)


def same(a: tuple[Trainer, FitResult], b: tuple[Trainer, FitResult]) -> None:
    assert a[1].selection == b[1].selection
    assert adapters(a[0].model) == adapters(b[0].model)
    assert max_difference(adapter_state(a[0].model), adapter_state(b[0].model)) == 0.0


@pytest.mark.parametrize("name", a_third(METHODS, first=0))
def test_resume_from_every_checkpoint(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    done = run(tmp_path / "whole", method, steps=10)
    found = checkpoints(tmp_path / "whole")
    seam = done[1].seam_step
    expected = {f"checkpoint-{s}" for s in (3, 6, 9, 10)}
    assert set(found) == expected | ({f"checkpoint-{seam}", f"seam-{seam}"} if seam else set())
    for each in found:
        # A machine that has only this checkpoint, under another name.
        out = tmp_path / each
        shutil.copytree(tmp_path / "whole" / each, out / each)
        same(run(out, method, resume=True, steps=10), done)


def telling(found: list[str]) -> list[str]:
    """Of a run's checkpoints the first, the last, the seam's, and the one at the seam's step: one of each kind."""
    in_order = sorted((name for name in found if not name.startswith("seam")), key=lambda name: int(name[11:]))
    (seam,) = set(found) - set(in_order)
    at_the_seam = seam.replace("seam", "checkpoint")
    return [*dict.fromkeys([in_order[0], *({at_the_seam} & set(in_order)), seam, in_order[-1]])]


@pytest.mark.parametrize("name", [*long("weightlora-paper"), "weightlora+"])
@pytest.mark.parametrize("arguments", [
    {"eval_strategy": "epoch"},
    {"gradient_accumulation_steps": 2},
    {"lr_scheduler_type": "cosine", "warmup_steps": 4, "optim": "sgd"},
    {"save_strategy": "epoch"},
], ids=["eval", "accumulation", "schedule", "epoch"])  # fmt: skip
def test_resume_under_other_arguments(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    done = run(tmp_path / "whole", METHODS[name], **arguments)
    for each in telling(checkpoints(tmp_path / "whole")):
        shutil.copytree(tmp_path / "whole" / each, tmp_path / each / each)
        same(run(tmp_path / each, METHODS[name], resume=True, **arguments), done)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_resume_from_a_path_elsewhere(step: int, tmp_path: Path) -> None:
    method = METHODS["weightlora-paper"]
    done = run(tmp_path / "whole", method)
    backup = shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "backup" / f"checkpoint-{step}")
    before = checkpoints(backup)
    for strategy in ("steps", "no"):
        same(run(tmp_path / strategy, method, resume=backup, save_strategy=strategy), done)
        assert checkpoints(backup) == before


def test_resume_twice_and_across_the_seam(tmp_path: Path) -> None:
    method = METHODS["weightlora+"]
    done = run(tmp_path / "whole", method)
    out = tmp_path / "again"
    for stop in ("checkpoint-3", "seam-5", "checkpoint-9"):
        if not (out / stop).is_dir():
            shutil.copytree(tmp_path / "whole" / stop, out / stop)
        for later in checkpoints(out):
            if int(later.rsplit("-", 1)[1]) > int(stop.rsplit("-", 1)[1]):
                shutil.rmtree(out / later)
        same(run(out, method, resume=True), done)


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    method = METHODS["weightlora"]
    done = run(tmp_path, method)
    again = run(tmp_path, method, resume=True)
    same(again, done)
    assert again[0].state.global_step == 12


def test_nothing_to_resume_means_from_the_start(tmp_path: Path) -> None:
    method = METHODS["weightlora-paper"]
    same(run(tmp_path / "empty", method, resume=True), run(tmp_path / "fresh", method))


# strategies


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({"save_strategy": "no"}, {"seam-5"}),
        ({"save_strategy": "epoch"}, {"checkpoint-5", "seam-5", "checkpoint-8", "checkpoint-12"}),
        ({"save_steps": 4, "save_total_limit": 1}, {"seam-5", "checkpoint-12"}),
        ({"save_steps": 4, "save_total_limit": 2}, {"seam-5", "checkpoint-8", "checkpoint-12"}),
        ({"save_steps": 5}, {"checkpoint-5", "seam-5", "checkpoint-10", "checkpoint-12"}),
    ],
)
def test_saving_strategies(arguments: dict[str, Any], left: set[str], tmp_path: Path) -> None:
    method = METHODS["weightlora-paper"]
    done = run(tmp_path / "a", method, **arguments)
    assert set(checkpoints(tmp_path / "a")) == left
    same(done, run(tmp_path / "b", method))


BEST: dict[str, Any] = {"metric_for_best_model": "loss"}


@pytest.mark.parametrize("seam", [*long(4), 5, *long(8)])
@pytest.mark.parametrize("better_later", [True, False])
def test_saving_the_best(seam: int, better_later: bool, tmp_path: Path) -> None:
    method = WeightLoRA(k=2, select_after=seam)
    arguments = {**BEST, "greater_is_better": not better_later, "eval_strategy": "steps", "eval_steps": 2}
    done = run(tmp_path / "a", method, save_strategy="best", **arguments)
    assert f"seam-{seam}" in checkpoints(tmp_path / "a")
    assert done[0].args.save_strategy == "best"
    same(done, run(tmp_path / "b", method, eval_strategy="steps", eval_steps=2))
    for each in telling(checkpoints(tmp_path / "a")):
        shutil.copytree(tmp_path / "a" / each, tmp_path / each / each)
        same(run(tmp_path / each, method, resume=True, save_strategy="best", **arguments), done)


@pytest.mark.parametrize(("limit", "seam", "better_later"), pairs([None, 1, 2], [5, 8], [True, False]))
def test_load_best_model_at_end(limit: int | None, seam: int, better_later: bool, tmp_path: Path) -> None:
    """The best model is looked for among those after the seam: the ones before have another structure."""
    method = WeightLoRA(k=2, select_after=seam)
    arguments = {
        **BEST,
        "greater_is_better": not better_later,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    made, result = run(tmp_path, method, load_best_model_at_end=True, save_total_limit=limit, **arguments)
    assert made.args.load_best_model_at_end
    losses = {x["step"]: x["eval_loss"] for x in made.state.log_history if "eval_loss" in x and x["step"] > seam}
    assert sorted(losses) == list(range(seam + 1, 13))
    best = (min if better_later else max)(losses, key=lambda step: losses[step])
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert len(adapters(made.model)) == result.selection.k == 2  # type: ignore[union-attr]


def test_arguments_are_given_back(tmp_path: Path) -> None:
    arguments = {**BEST, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    made, _ = run(tmp_path, METHODS["weightlora"], load_best_model_at_end=True, save_only_model=False, **arguments)
    assert (made.args.load_best_model_at_end, made.args.save_only_model) == (True, False)
    assert not [c for c in made.callback_handler.callbacks if type(c).__module__.startswith("weightlora")]


def test_stale_files_of_an_older_run_are_not_mixed_in(tmp_path: Path) -> None:
    arguments = {**BEST, "eval_strategy": "steps", "eval_steps": 3}
    run(tmp_path, WeightLoRA(k=1, select_after=4), save_strategy="best", **arguments)
    method = WeightLoRA(k=3, select_after=4)
    made = trainer(tmp_path, save_strategy="best", **arguments)
    refused("holds checkpoints of another run .*; give another output_dir", lambda: fit(made, method))
    fit(made, method, overwrite=True, measure=False)
    for name in checkpoints(tmp_path):
        assert json.loads((tmp_path / name / "weightlora.json").read_text())["method"] == method.to_dict()


# what is refused


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    run(tmp_path, METHODS["weightlora"])
    assert latest(tmp_path) == tmp_path / "checkpoint-12"
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{")
    assert whole(tmp_path / "checkpoint-12") is None
    assert latest(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / "weightlora.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert latest(tmp_path) == tmp_path / "seam-5"
    shutil.rmtree(tmp_path / "seam-5")
    assert latest(tmp_path) == tmp_path / "checkpoint-5"
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == tmp_path / "checkpoint-5"
    assert latest(tmp_path / "nowhere") is None
    assert resolve(False, tmp_path) is None


def refused(message: str, run_: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        run_()
    assert "\n" not in str(caught.value)


def test_other_models_methods_and_folders_are_refused(tmp_path: Path) -> None:
    method = METHODS["weightlora"]
    run(tmp_path, method)

    def untouched(model: nn.Module) -> Callable[[], Any]:
        return lambda: run(tmp_path, method, resume=True, model=model)

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    refused("the checkpoint belongs to another model: .*9", untouched(lora(layers=3)))
    refused(r"another model: .*\(16, 16, 4\).*\(16, 16, 2\)", untouched(lora(rank=2)))
    refused("was made with .*; resume with the same method", lambda: run(tmp_path, DeepestAdapters(k=2), resume=True))
    refused(
        "checkpoint-77 is not a whole checkpoint of a WeightLoRA run; .*checkpoint-12 is whole",
        lambda: run(tmp_path, method, resume=tmp_path / "checkpoint-77"),
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path, METHODS["weightlora-paper"])
    state = tmp_path / "checkpoint-3" / "weightlora.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    refused(
        "weightlora.safetensors is damaged", lambda: run(tmp_path, METHODS["weightlora-paper"], resume=state.parent)
    )


def test_final_checkpoints_are_stock_adapters(tmp_path: Path) -> None:
    from peft import PeftModel
    from tests.builders import base, batch, logits

    made, _ = run(tmp_path, METHODS["weightlora-paper"])
    stock = PeftModel.from_pretrained(base("bert"), tmp_path / "checkpoint-12")
    assert torch.equal(logits(stock, batch()), logits(made.model, batch()))


@pytest.mark.parametrize("method", [METHODS["weightlora"], DoRA()], ids=["weightlora", "dora"])
def test_temporary_files_of_a_seal_are_swept(method: Method, tmp_path: Path) -> None:
    """A process died while it sealed a checkpoint that is whole otherwise; the resumed run removes what it left."""

    def again(resume: bool) -> None:
        run(tmp_path, method, resume, model=lora(use_dora=method.name == "dora"))

    again(False)
    folders = [path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]
    before = {path for folder in folders for path in folder.iterdir()}
    for folder in folders:
        (folder / f".{SEAL}.th0fvw39").write_text("{")
    again(True)
    assert len(folders) > 1
    assert {path for folder in folders for path in folder.iterdir()} == before

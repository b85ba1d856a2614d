"""A run that the method does not change is the stock trainer's run, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import FAMILIES, Spy, adapter_state, examples, long, lora, max_difference, trainer, warm
from torch import Tensor, nn
from transformers import Trainer

from weightlora.errors import ConfigError
from weightlora.methods import LoRA, Method, RandomAdapters, WeightLoRA
from weightlora.ops import why_no_triton
from weightlora.training import fit

# 32 examples in batches of 4 are eight steps an epoch: a seam inside the first, at its end, and in the second.
SEAMS = pytest.mark.parametrize("seam", [1, *long(5), 8, *long(11)])


def stock(out: Path, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    made = trainer(out, model, **arguments)
    made.train()
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Stock training under some arguments, done once for all tests that compare with it."""
    done: dict[str, Trainer] = {}

    def once(model: Callable[[], nn.Module] = lora, **arguments: Any) -> Trainer:
        key = repr((model.__name__, sorted(arguments.items())))
        if key not in done:
            done[key] = stock(tmp_path_factory.mktemp("stock"), model(), **arguments)
        return done[key]

    return once


def fitted(
    out: Path, method: Method, model: nn.Module | None = None, micro: Any = (None, None), path: Any = "stock",
    **arguments: Any,
) -> Trainer:  # fmt: skip
    """Adapters compute as PEFT computes them, unless told otherwise: then every sum has the same order."""
    made = trainer(out, model, **arguments)
    fit(made, method, micro_batch=micro[0], final_micro_batch=micro[1], engine=path, measure=False)
    return made


def everything(seam: int = 5, **settings: Any) -> WeightLoRA:
    """A seam at which nothing is decided away."""
    return WeightLoRA(k=1.0, select_after=seam, **settings)


def gap(a: Trainer, b: Trainer) -> float:
    return max_difference(adapter_state(a.model), adapter_state(b.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_stock_training(family: str, tmp_path: Path) -> None:
    plain = stock(tmp_path / "a", lora(family))
    assert gap(plain, fitted(tmp_path / "b", LoRA(), lora(family))) == 0.0
    start = trainer(tmp_path / "c", lora(family))
    assert gap(plain, start) > 1e-3  # something was learnt


@pytest.mark.parametrize("family", FAMILIES)
def test_all_gates_held_at_one_are_stock_lora(family: str, tmp_path: Path) -> None:
    method = everything(score="omega")
    plain, gated = stock(tmp_path / "a", lora(family)), fitted(tmp_path / "b", method, lora(family))
    assert gap(plain, gated) == 0.0


@SEAMS
@pytest.mark.parametrize("score", ["credit", "trapezoid"])
def test_a_seam_that_changes_nothing(plain: Any, seam: int, score: str, tmp_path: Path) -> None:
    assert gap(plain(), fitted(tmp_path, everything(seam, score=score))) == 0.0


@SEAMS
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_with_evaluation(plain: Any, seam: int, strategy: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"eval_strategy": strategy, "eval_steps": 4}
    theirs, ours = plain(**arguments), fitted(tmp_path, everything(seam), **arguments)
    assert gap(theirs, ours) == 0.0
    logs = [[x for x in t.state.log_history if "eval_loss" in x] for t in (theirs, ours)]
    assert [(x["step"], x["eval_loss"]) for x in logs[1]] == [(x["step"], x["eval_loss"]) for x in logs[0]]


@pytest.mark.parametrize("accumulation", [2, 3])
@pytest.mark.parametrize("seam", [2, 4])
def test_with_accumulation(plain: Any, accumulation: int, seam: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "steps": 6}
    assert gap(plain(**arguments), fitted(tmp_path, everything(seam), **arguments)) == 0.0


def test_by_epochs_and_with_an_uneven_end(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"steps": -1, "num_train_epochs": 3, "count": 18}
    plain, ours = stock(tmp_path / "a", **arguments), fitted(tmp_path / "b", everything(0.4), **arguments)
    assert plain.state.global_step == ours.state.global_step == 15
    assert gap(plain, ours) == 0.0


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "constant_with_warmup"])
def test_with_other_schedules(scheduler: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"lr_scheduler_type": scheduler, "warmup_steps": 6, "max_grad_norm": 0.1}
    assert gap(stock(tmp_path / "a", **arguments), fitted(tmp_path / "b", everything(), **arguments)) == 0.0


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adagrad", "adafactor", "rmsprop"])
def test_with_other_optimizers(optim: str, tmp_path: Path) -> None:
    assert gap(stock(tmp_path / "a", optim=optim), fitted(tmp_path / "b", everything(), optim=optim)) == 0.0


def own_optimizer(model: nn.Module, schedule: bool) -> tuple[Any, Any]:
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n], "lr": 3e-2},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7) if schedule else None


@pytest.mark.parametrize("schedule", [False, True])
def test_with_the_users_own_optimizer(schedule: bool, tmp_path: Path) -> None:
    made = []
    for name, run in (("a", Trainer.train), ("b", lambda t: fit(t, everything(), engine="stock", measure=False))):
        model = lora()
        optimizers = own_optimizer(model, schedule)
        each = trainer(tmp_path / name, model, optimizers=optimizers)
        each.add_callback(spy := Spy())
        run(each)  # type: ignore[operator]
        made.append((each, spy.rates))
        assert getattr(each.optimizer, "optimizer", each.optimizer) is optimizers[0]
    assert gap(made[0][0], made[1][0]) == 0.0
    assert made[0][1] == made[1][1]


@pytest.mark.parametrize(
    "method", [LoRA(), everything(), everything(score="omega"), RandomAdapters(k=2)], ids=lambda m: m.name
)
def test_the_lean_path_differs_by_rounding(method: Method, tmp_path: Path) -> None:
    """The same sums in another order (``addmm``), with gates and without, before and after a seam.

    In float64 that is 1e-16 a product, and twelve steps of Adam keep it
    small: where a gradient is not itself rounding noise, its normalised step moves by as much as the gradient does.
    """

    def model() -> nn.Module:
        return warm(lora(dropout=0.0).double())

    plain = fitted(tmp_path / "a", method, model(), path="stock")
    ours = fitted(tmp_path / "b", method, model(), path="autograd")
    assert gap(plain, ours) < 1e-9


def test_training_takes_the_lean_path_unless_told_otherwise(tmp_path: Path) -> None:
    """Less is kept for the same operations, in every phase: seen from the phases' own counts."""
    kept, flops = {}, {}
    for path in ("auto", "autograd", "stock"):
        run = fit(trainer(tmp_path / path, lora()), WeightLoRA(k=3, select_after=5), engine=path)  # type: ignore[arg-type]
        kept[path] = [phase.kept_activation_bytes or 0 for phase in run.phases]
        flops[path] = [phase.flops_per_step or 0 for phase in run.phases]
        assert not any(getattr(m, "lora_variant", None) for m in run.model.modules())  # stock PEFT comes out
    assert kept["auto"] == kept["autograd"]
    assert all(0 < lean < stock for lean, stock in zip(kept["auto"], kept["stock"], strict=True))
    assert all(0 < lean <= stock for lean, stock in zip(flops["auto"], flops["stock"], strict=True))


@pytest.mark.parametrize(
    ("path", "message"),
    [("fast", "engine 'fast' is unknown; use one of auto, autograd, triton, reference, stock"),
     ("triton", "engine 'triton' cannot run: .*; use engine='autograd'")],
)  # fmt: skip
def test_a_path_that_cannot_run_is_refused_before_anything_happens(path: Any, message: str, tmp_path: Path) -> None:
    if path == "triton" and why_no_triton() is None:
        pytest.skip("Triton can run here")
    with pytest.raises(ConfigError, match=message):
        fit(trainer(tmp_path / "a"), LoRA(), engine=path)
    assert not list((tmp_path / "a").iterdir())


Micro = tuple[int | None, int | None]


def exact() -> nn.Module:
    """In float64, without dropout."""
    return lora(dropout=0.0).double()


@pytest.mark.parametrize("micro", [(2, 8), (8, 4), (1, None), (None, 2)])
@pytest.mark.parametrize("seam", [3, 4, 5])
def test_the_micro_batch_may_change_at_the_seam(plain: Any, micro: Micro, seam: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"per_device_train_batch_size": 8, "steps": 8}
    theirs = plain(exact, **arguments)
    ours = fitted(tmp_path, everything(seam), exact(), micro, **arguments)
    assert theirs.state.global_step == ours.state.global_step == 8
    # The mean over a batch becomes a mean of means: float64 rounding, and eight steps of Adam.
    assert gap(theirs, ours) < 1e-9


def test_micro_batches_with_accumulation_keep_the_effective_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, gradient_accumulation_steps=2, steps=6)
    result = fit(made, everything(2), micro_batch=2, final_micro_batch=8, measure=False)
    assert [(p.micro_batch, p.accumulation, p.steps) for p in result.phases] == [(2, 4, 2), (8, 1, 4)]


class Eyes:
    """Notes what the model is trained on, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, _args: Any, kwargs: Any) -> None:
        if module.training:
            self.seen.append(kwargs["input_ids"].clone())


@pytest.mark.parametrize(
    "method", [WeightLoRA(k=2, select_after=5), WeightLoRA(k=2, select_after=8), RandomAdapters(k=2)]
)
def test_schedule_and_data_order_run_on(method: Method, tmp_path: Path) -> None:
    notes: list[tuple[dict[int, float], list[Tensor]]] = []
    runs: list[Callable[[Trainer], Any]] = [Trainer.train, lambda t: fit(t, method, measure=False)]
    for index, run in enumerate(runs):
        model = lora()
        eyes, spy = Eyes(model), Spy()
        made = trainer(tmp_path / str(index), model, steps=20, lr_scheduler_type="cosine", warmup_steps=6)
        made.add_callback(spy)
        run(made)
        notes.append((spy.rates, eyes.seen))
    assert notes[0][0] == notes[1][0]
    assert sorted(notes[0][0]) == list(range(1, 21))
    assert len(set(notes[0][0].values())) > 10
    assert torch.equal(torch.stack(notes[0][1]), torch.stack(notes[1][1]))


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    """Also where B is not zero at the start, and so the gates have gradients."""
    paper = WeightLoRA.from_preset("paper", k=2, select_after=5)
    made = []
    for measure in (False, True):
        each = trainer(tmp_path / str(measure), warm(lora()))
        result = fit(each, paper, measure=measure)
        assert all((phase.flops_per_step is None) != measure for phase in result.phases)
        made.append((each, result))
    assert made[0][1].selection == made[1][1].selection
    assert gap(made[0][0], made[1][0]) == 0.0


def test_two_runs_are_the_same_run(tmp_path: Path) -> None:
    method = WeightLoRA.from_preset("official", k=2)
    runs = [fitted(tmp_path / name, method, data=examples(24)) for name in "ab"]
    assert gap(*runs) == 0.0

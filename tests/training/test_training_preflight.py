"""What would train nothing, or end a run at its seam, is refused before the first step and before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from tests.builders import QKV, Spy, adapter_state, base, batches, lora, max_difference, trainer
from torch import nn
from transformers import Trainer

import weightlora as wl
from weightlora.errors import AdapterError, ConfigError, ScheduleError

METHOD = wl.WeightLoRA(k=2, select_after=3)
N = 6  # two blocks of bert, q, k and v


def freeze(model: PeftModel, *parts: str) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_" in name and all(part in name for part in parts):
            parameter.requires_grad_(False)
    return model


def merged() -> PeftModel:
    model: Any = lora()
    model.merge_adapter()
    return model  # type: ignore[no-any-return]


def off() -> PeftModel:
    model: Any = lora()
    model.base_model.disable_adapter_layers()
    return model  # type: ignore[no-any-return]


def other_active() -> PeftModel:
    model = lora()
    model.add_adapter("b", LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter(["b"])  # behind PEFT's back: the model still calls "default" active
    return model


BAD_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "merged": (merged, r"6 of 6 adapters are merged into the base .*; call model\.unmerge_adapter\(\)"),
    "off": (off, r"6 of 6 adapters are off .*; call model\.enable_adapter_layers\(\)"),
    "other-active": (other_active, r"6 of 6 adapters are not active .*; call model\.set_adapter\('default'\)"),
    "frozen": (lambda: freeze(lora()), "6 of 6 adapters are frozen .*requires_grad"),
    "half-frozen": (lambda: freeze(lora(), "layer.0."), r"3 of 6 adapters are frozen .*layer\.0\.attention\.self\.que"),
    "B-frozen": (lambda: freeze(lora(), "lora_B"), "6 of 6 adapters are zero with a frozen B"),
    "no-adapters": (lambda: base("bert"), "has no LoRA adapters; wrap it first"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.parametrize("way", ["fit", "attach"])
def test_adapters_that_would_learn_nothing(case: str, way: str, tmp_path: Path) -> None:
    make, message = BAD_MODELS[case]
    model, spy = make(), Spy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainer(tmp_path / "run", model)
    made.add_callback(spy)
    with pytest.raises(AdapterError, match=message):
        wl.fit(made, METHOD) if way == "fit" else wl.attach(model, METHOD, optimizer)
    assert not spy.rates  # no step
    assert not optimizer._optimizer_step_pre_hooks  # and no trace
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not list((tmp_path / "run").glob("*"))


def test_a_frozen_A_is_a_method_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, freeze(lora(), "lora_A"), steps=6)
    result = wl.fit(made, METHOD, measure=False)
    assert result.selection is not None
    assert result.selection.k == 2


def test_injected_adapters_are_for_loops(tmp_path: Path) -> None:
    def injected() -> Any:
        model = base("bert")
        model.add_adapter(LoraConfig(target_modules=list(QKV["bert"]), r=4), adapter_name="default")
        return model

    made = trainer(tmp_path, injected())
    with pytest.raises(AdapterError, match=r"injected \(model\.add_adapter\).*use peft\.get_peft_model"):
        wl.fit(made, METHOD)
    assert made.state.global_step == 0
    assert attached(injected()).k == 2


class Compiled(nn.Module):
    """A compiled part in the middle of a base."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.body = torch.compile(inner, backend="eager")
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.body(x))
        return out


def test_models_compiled_by_hand(tmp_path: Path) -> None:
    compiled: Any = torch.compile(lora(), backend="eager")
    made = trainer(tmp_path, compiled, remove_unused_columns=False)
    with pytest.raises(AdapterError, match=r"compiled by hand.*torch_compile=True"):
        wl.fit(made, METHOD)
    assert made.state.global_step == 0
    part = PeftModel(Compiled(), LoraConfig(target_modules=["0", "2"]))
    with pytest.raises(AdapterError, match=r"compiled by hand.*_orig_mod"):
        wl.attach(part, METHOD, torch.optim.SGD(part.parameters(), lr=0.1))


@pytest.mark.parametrize("how", ["wrapped", "in-place"])
def test_a_loop_over_a_compiled_model(how: str) -> None:
    """A loop of one's own writes no checkpoint of the trainer's: there a compiled model ends as any other."""

    def run(compiled: bool) -> wl.Selection:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        model: Any = PeftModel(net, LoraConfig(r=2, target_modules=["0", "2"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if compiled and how == "wrapped":
            model = torch.compile(model, backend="eager")
        elif compiled:
            model.compile(backend="eager")
        tuner = wl.attach(model, wl.WeightLoRA(k=1, select_after=2), optimizer)
        stream = torch.Generator().manual_seed(1)
        for _ in range(4):
            model(torch.randn(8, 4, generator=stream)).pow(2).mean().backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
        return tuner.finish()

    assert run(True).names == run(False).names


def attached(model: nn.Module, optimizer: Any = None, method: Any = METHOD, lr: float = 1e-2) -> wl.Selection:
    """A short loop of one's own to the end."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    tuner = wl.attach(model, method, optimizer)
    for _, inputs in zip(range(5), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    return tuner.finish()


def of(model: nn.Module, *parts: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)]


BAD_OPTIMIZERS: dict[str, tuple[tuple[str, ...], str]] = {
    "head-alone": (("classifier",), "the optimizer holds no adapter of this model"),
    "A-alone": (("lora_A", "classifier"), "the other half of the adapters but no B; one optimizer must hold both"),
    "B-alone": (("lora_B",), "the other half of the adapters but no A; .*or freeze A"),
    "one-block": (("layer.1.", "classifier"), r"lacks 6 of the 12 factors .*\(A of bert\.encoder\.layer\.0\."),
    "one-half-more": (("lora_A", "layer.1."), r"lacks 3 of the 12 factors|no B"),
}


@pytest.mark.parametrize("case", BAD_OPTIMIZERS)
@pytest.mark.parametrize("way", ["fit", "late", "attach"])
def test_optimizers_that_do_not_hold_the_adapters(case: str, way: str, tmp_path: Path) -> None:
    parts, message = BAD_OPTIMIZERS[case]
    model, spy = lora(), Spy()
    optimizer = torch.optim.SGD(of(model, *parts), lr=0.1)

    class Late(Trainer):
        """Makes its optimizer when it begins, as trainers do; nobody can look at it before."""

        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            self.optimizer = optimizer
            return optimizer

    given = (None, None) if way == "late" else (optimizer, None)
    made = trainer(tmp_path, model, optimizers=given, cls=Late if way == "late" else Trainer)
    made.add_callback(spy)
    with pytest.raises(AdapterError, match=message):
        wl.attach(model, METHOD, optimizer) if way == "attach" else wl.fit(made, METHOD, measure=False)
    assert not spy.rates


def test_frozen_A_may_be_missing_from_the_optimizer() -> None:
    model = freeze(lora(), "lora_A")
    assert attached(model, torch.optim.AdamW(of(model, "lora_B"), lr=1e-2)).k == 2


def test_what_accelerate_has_wrapped() -> None:
    """The loop with the wrapped optimizer, whatever came first, ends where the plain one ends."""

    def run(order: str) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = lora(dropout=0.0)
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if order == "plain":
            tuner = wl.attach(model, METHOD, optimizer)
        elif order == "before":
            tuner = wl.attach(model, METHOD, optimizer)
            optimizer = Accelerator(cpu=True).prepare(optimizer)
        else:
            optimizer = Accelerator(cpu=True).prepare(optimizer)
            tuner = wl.attach(model, METHOD, optimizer)
        for _, inputs in zip(range(5), batches(), strict=False):
            model(**inputs).loss.backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
        return tuner.finish().names, adapter_state(model)

    names, truth = run("plain")
    for order in ("before", "after"):
        found, state = run(order)
        assert found == names
        assert max_difference(state, truth) == 0.0


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        wl.WeightLoRA(k=2, select_after=3, coverage=True),
        wl.WeightLoRA(k=2, select_after=3, preset="paper"),
        wl.WeightLoRAPlus(k=2, select_after=3),
    ],
    ids=lambda method: method.label,
)
def test_scores_that_are_all_zero_choose_nothing(method: wl.WeightLoRA, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"all 6 .* no adapter has learned anything"):
        attached(lora(), method=method, lr=0.0)
    made = trainer(tmp_path, steps=6, learning_rate=0.0)
    with pytest.raises(ScheduleError, match=r"all 6 .* no adapter has learned anything"):
        wl.fit(made, method, measure=False)


def test_nothing_is_chosen_at_k_equal_n() -> None:
    assert attached(lora(), method=wl.WeightLoRA(k=N, select_after=3), lr=0.0).k == N


@pytest.mark.parametrize("name", ["mine", "default"])
def test_the_best_checkpoint_of_an_adapter_with_a_name_of_its_own(name: str, tmp_path: Path) -> None:
    """Transformers looks for the best weights where "default" has its own, and with another name keeps the last."""
    settings = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=list(QKV["bert"]))
    made = trainer(
        tmp_path, PeftModel(base("bert"), settings, adapter_name=name), steps=6, load_best_model_at_end=True,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    if name == "default":
        assert wl.fit(made, METHOD, measure=False).selection is not None
        return
    with pytest.raises(ConfigError, match="loads only an adapter called 'default', and this one is 'mine'"):
        wl.fit(made, METHOD)
    assert made.state.global_step == 0
    made.args.load_best_model_at_end = False
    assert wl.fit(made, METHOD, measure=False).selection is not None


def test_one_line_for_what_is_no_trainer_method_or_optimizer(tmp_path: Path) -> None:
    model = lora()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainer(tmp_path, model)
    cases: dict[str, Callable[[], Any]] = {
        "fit takes a transformers.Trainer, not a PeftModel": lambda: wl.fit(model, METHOD),  # type: ignore[arg-type]
        "fit takes a transformers.Trainer, not a NoneType": lambda: wl.fit(None, METHOD),  # type: ignore[arg-type]
        "'weightlora' is a method's name": lambda: wl.fit(made, "weightlora"),  # type: ignore[arg-type]
        "WeightLoRA is a class": lambda: wl.fit(made, wl.WeightLoRA),  # type: ignore[arg-type]
        "method=3 is no method": lambda: wl.fit(made, 3),  # type: ignore[arg-type]
        "resume=3 is not allowed": lambda: wl.fit(made, METHOD, resume=3),  # type: ignore[arg-type]
        r"'weightlora' is a method's name; give a method: weightlora\.method": lambda: wl.attach(
            model, "weightlora", optimizer  # type: ignore[arg-type]
        ),
        "optimizer is a list": lambda: wl.attach(model, METHOD, [optimizer, optimizer]),  # type: ignore[arg-type]
        "optimizer is a PeftModel": lambda: wl.attach(model, METHOD, model),  # type: ignore[arg-type]
        "max_steps='9' is not allowed": lambda: wl.attach(model, METHOD, optimizer, max_steps="9"),  # type: ignore[arg-type]
        "max_steps=0 is not allowed": lambda: wl.attach(model, METHOD, optimizer, max_steps=0),
        "engine 3 is unknown": lambda: wl.attach(model, METHOD, optimizer, engine=3),  # type: ignore[arg-type]
        r"micro_batch='2' is not allowed": lambda: wl.fit(made, METHOD, micro_batch="2"),  # type: ignore[arg-type]
        "final_micro_batch=0 is not allowed": lambda: wl.fit(made, METHOD, final_micro_batch=0),
        "log_omegas 'some' is unknown": lambda: wl.fit(made, METHOD, log_omegas="some"),  # type: ignore[arg-type]
        "model is a Trainer": lambda: wl.attach(made, METHOD, optimizer),  # type: ignore[arg-type]
    }  # fmt: skip
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message):
            call()
    assert made.state.global_step == 0

"""Initialisations that move the base, and what a run finds and says before its first step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from tests.builders import QKV, a_third, adapter_state, base, batch, logits, lora, max_difference, trainer, warm
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from weightlora.errors import AdapterError, CheckpointError, ConfigError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.surgery import disconnect
from weightlora.methods import LoRA, Method, RandomAdapters, WeightLoRA, WeightLoRAPlus, method
from weightlora.training import attach, fit
from weightlora.training.sharding import check_method

KEPT = WeightLoRA(k=2, select_after=3)
PAPER = WeightLoRA.from_preset("paper", k=2, select_after=3)
GROWN = WeightLoRAPlus(k=2, select_after=3)
MOVES = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
TARGETS = list(QKV["bert"])


def initialised(init: str, **settings: Any) -> PeftModel:
    """BERT whose adapters PEFT has initialised from the base's weights, inputs or gradients."""
    if init not in ("corda", "lora_ga"):
        return lora(dropout=0.0, init_lora_weights=init, **settings)
    model = base("bert", dropout=0.0)
    shape = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    settings = {**shape, "init_lora_weights": init, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if init == "corda":
            from peft.tuners.lora.config import CordaConfig

            config = LoraConfig(**settings, corda_config=CordaConfig(corda_method="kpm"))
            preprocess_corda(model, config, run_model=lambda: [model(**batch(1, seed=s)) for s in range(40)])
        else:
            config = LoraConfig(**settings, lora_ga_config=LoraGAConfig())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, about the hooks that PEFT counts gradients by
                preprocess_loraga(model, config, train_step=lambda: learn(model))
            model.zero_grad()
        return get_peft_model(model, config)


def learn(model: nn.Module) -> None:
    model(**batch(8)).loss.backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under q, k and v, whether an adapter is on them or not."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value.detach().clone()
        for name, value in model.state_dict().items()
        if any(target in name for target in TARGETS) and "lora_" not in name and name.endswith("weight")
    }


@pytest.fixture(scope="module")
def stock() -> dict[str, Tensor]:
    return weights(base("bert"))


@pytest.mark.parametrize("init", a_third(MOVES, first=0))
@pytest.mark.parametrize("made", [KEPT, GROWN, RandomAdapters(k=2)], ids=["weightlora", "growing", "before training"])
def test_a_removed_adapter_gives_its_part_of_the_base_back(
    init: str, made: Method, stock: dict[str, Tensor], tmp_path: Path
) -> None:
    model = initialised(init)
    moved = weights(model)
    assert max(float((moved[name] - stock[name]).abs().max()) for name in stock) > 1e-3
    each = trainer(tmp_path, model, steps=6)
    result = fit(each, made, measure=False)
    after = weights(each.model)
    for name, weight in after.items():
        kept = name.removesuffix(".weight") in result.selection.names  # type: ignore[union-attr]
        torch.testing.assert_close(weight, (moved if kept else stock)[name], rtol=0, atol=0 if kept else 2e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_with_every_adapter_kept_it_is_stock_training(init: str, tmp_path: Path) -> None:
    ours, plain = trainer(tmp_path / "a", initialised(init)), trainer(tmp_path / "b", initialised(init))
    fit(ours, WeightLoRA(k=6, select_after=3), engine="stock", measure=False)
    plain.train()
    assert max_difference(adapter_state(ours.model), adapter_state(plain.model)) == 0.0
    assert max_difference(weights(ours.model), weights(plain.model)) == 0.0


class Death(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("made", [PAPER, GROWN], ids=["gated", "growing"])
def test_a_run_that_died_goes_on_to_the_same_weights(made: Method, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", initialised("pissa"), steps=6)
    fit(whole, made, measure=False)
    for step in (2, 5):
        saving = {"steps": 6, "save_strategy": "steps", "save_steps": 1}
        dies = trainer(tmp_path / str(step), initialised("pissa"), **saving)
        dies.add_callback(Death(step))
        with pytest.raises(KeyboardInterrupt):
            fit(dies, made, measure=False)
        again = trainer(tmp_path / str(step), initialised("pissa"), **saving)
        fit(again, made, resume=True, measure=False)
        assert max_difference(adapter_state(again.model), adapter_state(whole.model)) == 0.0
        assert max_difference(weights(again.model), weights(whole.model)) == 0.0


def loop(model: nn.Module, tuner: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()


def begun(seed: int) -> tuple[PeftModel, Any, Any]:
    model = initialised("pissa_niter_1")
    if seed:  # another process drew other numbers for the approximate factors
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(base("bert", dropout=0.0), model.peft_config["default"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return model, attach(model, KEPT, optimizer, max_steps=6), optimizer


def test_a_loop_of_ones_own_goes_on_where_the_initialisation_drew_other_numbers(stock: dict[str, Tensor]) -> None:
    model, tuner, optimizer = begun(0)
    loop(model, tuner, optimizer, range(2))
    held = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key or "classifier" in key}
    progress = tuner.state_dict()
    other, again, second = begun(77)
    assert max_difference(weights(other), weights(model)) > 1e-5
    other.load_state_dict(held, strict=False)
    again.load_state_dict(progress)
    for each in ((model, tuner, optimizer), (other, again, second)):
        loop(*each, range(2, 6))
        each[1].finish()
    assert tuner.selection.names == again.selection.names
    torch.testing.assert_close(logits(other, batch()), logits(model, batch()), rtol=0, atol=1e-4)
    removed = {
        name: w for name, w in weights(other).items() if name.removesuffix(".weight") not in again.selection.names
    }
    assert all(float((weight - stock[name]).abs().max()) < 5e-6 for name, weight in removed.items())


@pytest.mark.parametrize("init", a_third(MOVES, first=1))
@pytest.mark.parametrize("profile", ["native", "portable", "merged"])
def test_exports_do_on_the_stock_base(init: str, profile: str, tmp_path: Path) -> None:
    base("bert", dropout=0.0).save_pretrained(tmp_path / "base")
    model = initialised(init)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuner = attach(model, GROWN, torch.optim.SGD(model.parameters(), lr=0.1), max_steps=6)
    optimizer = tuner._optimizer
    loop(model, tuner, optimizer, range(6))
    tuner.finish()
    done = export(model, tmp_path / "out", profile)
    fresh: PreTrainedModel = base("bert", dropout=0.0)
    if profile == "merged":
        again: nn.Module = type(fresh).from_pretrained(tmp_path / "out")
    else:
        if profile == "portable":
            from safetensors.torch import load_file

            fresh.load_state_dict(load_file(tmp_path / "out" / "head.safetensors"), strict=False)
        again = PeftModel.from_pretrained(fresh, tmp_path / "out")
        assert any("initialised from the base's weights" in note for note in done.notes)
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), rtol=0, atol=2e-5)


def test_an_export_in_the_middle_of_a_warm_up(tmp_path: Path) -> None:
    model = initialised("olora")
    tuner = attach(model, PAPER, torch.optim.SGD(model.parameters(), lr=0.1), max_steps=6)
    gates = tuner._driver.gates
    assert gates is not None
    gates.set(torch.tensor([0.0, 1.0, -0.5, 0.0, 2.0, 0.7]))
    export(model, tmp_path / "out")
    again = PeftModel.from_pretrained(base("bert", dropout=0.0), tmp_path / "out")
    torch.testing.assert_close(logits(again, batch()), logits(model, batch()), rtol=0, atol=2e-5)


def half(init: str) -> PeftModel:
    model = base("bert", dropout=0.0).to(torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=init, task_type="SEQ_CLS", target_modules=TARGETS))


def loftq() -> PeftModel:
    model = lora(dropout=0.0)
    model.peft_config["default"].init_lora_weights = "loftq"  # itself it needs a GPU
    return model


def two(init: str) -> PeftModel:
    model = initialised(init)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    return model


@pytest.mark.parametrize(
    ("make", "made", "says"),
    [
        (lambda: half("pissa"), KEPT, r"'pissa' moved .*query \(torch.bfloat16\).*dtype=torch.float32"),
        (loftq, KEPT, "'loftq' moved .* not known exactly; use init_lora_weights=True, 'pissa' or 'olora'"),
        (lambda: warm(initialised("pissa")), KEPT, "no longer at its initial values.*fresh get_peft_model"),
        (lambda: warm(initialised("olora")), KEPT, "no longer at its initial values.*fresh get_peft_model"),
        (lambda: two("olora"), KEPT, "holds 2 adapters"),
        (lambda: initialised("pissa"), method("adalora"), "adalora gives them new values"),
        (lambda: initialised("pissa"), method("lora_drop"), "gives them new values"),
        (lambda: initialised("pissa"), WeightLoRA(k=2, select_after=3, init_A="official"), "gives them new values"),
        (lambda: lora(bias="lora_only"), KEPT, "bias='lora_only'.*would go on training; use bias='none', or 'all'"),
    ],
)
def test_what_cannot_be_given_back_is_refused_before_the_first_step(
    make: Callable[[], PeftModel], made: Method, says: str, tmp_path: Path
) -> None:
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=says):
        fit(trainer(tmp_path / "run", model), made)
    held_out = [batch()] if made.needs.held_out else []
    with pytest.raises(AdapterError, match=says):
        attach(model, made, torch.optim.SGD(model.parameters(), lr=0.1), max_steps=20, held_out=held_out)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_sharded_base_cannot_be_given_anything_back() -> None:
    policy = KEPT.begin(adapters(lora()), 20)
    check_method(KEPT, policy, None)
    with pytest.raises(ConfigError, match=r"'pissa' moved a part of the base's weights.*under FSDP"):
        check_method(KEPT, policy, "pissa")


def test_nothing_is_disconnected_whose_part_of_the_base_nobody_noted() -> None:
    model = initialised("pissa")
    before = weights(model)
    with pytest.raises(AdapterError, match="that part was not recorded before training"):
        disconnect(model, ["bert.encoder.layer.0.attention.self.query"])
    assert max_difference(weights(model), before) == 0.0


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_as_ever(
    init: str, stock: dict[str, Tensor], tmp_path: Path
) -> None:
    own = {"eva_config": EvaConfig()} if init == "eva" else {}
    each = trainer(tmp_path, lora(dropout=0.0, init_lora_weights=init, **own), steps=6)
    fit(each, KEPT, measure=False)
    assert max_difference(weights(each.model), stock) == 0.0


# what is said before training


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.WARNING, logger="weightlora"):
        yield lambda: "\n".join(record.getMessage() for record in caplog.records)


def unfrozen(**settings: Any) -> PeftModel:
    model = lora(dropout=0.0, **settings)
    model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            unfrozen,
            "portable, dense and gguf cannot hold 1 trained weights of the base (bert.embeddings.LayerNorm.weight)",
        ),
        (unfrozen, "no checkpoint of PEFT's holds bert.embeddings.LayerNorm.weight"),
        (lambda: lora(bias="all"), "trained weights of the base (bert.embeddings.LayerNorm.bias"),
        (lambda: lora(trainable_token_indices=[7]), "single trained tokens (bert.embeddings.word_embeddings)"),
        (lambda: initialised("olora"), "init_lora_weights='olora' moved the base"),
    ],
)
def test_what_exports_and_checkpoints_will_not_hold_is_said_before_training(
    make: Callable[[], PeftModel], says: str, said: Callable[[], str]
) -> None:
    model = make()
    attach(model, KEPT, torch.optim.SGD(model.parameters(), lr=0.1), max_steps=20)
    assert says in said()


def test_plain_lora_with_a_head_says_nothing(said: Callable[[], str]) -> None:
    model = lora()
    attach(model, LoRA(), torch.optim.SGD(model.parameters(), lr=0.1), max_steps=20)
    assert said() == ""


def test_a_run_that_no_checkpoint_holds_is_not_resumed(tmp_path: Path) -> None:
    saving = {"steps": 5, "save_strategy": "steps", "save_steps": 2}
    fit(trainer(tmp_path, unfrozen(), **saving), KEPT, measure=False)
    with pytest.raises(CheckpointError, match=r"LayerNorm.weight, which trains outside the adapters.*modules_to_save"):
        fit(trainer(tmp_path, unfrozen(), **saving), KEPT, resume=True)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, **saving}
    with pytest.raises(CheckpointError, match=r"LayerNorm.weight, which trains outside the adapters"):
        fit(trainer(tmp_path / "best", unfrozen(), **best), KEPT)
    biases = trainer(tmp_path / "bias", lora(bias="all"), **saving)
    fit(biases, KEPT, measure=False)
    fit(trainer(tmp_path / "bias", lora(bias="all"), **saving), KEPT, resume=True, measure=False)

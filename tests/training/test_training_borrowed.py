"""What ``fit`` and ``attach`` borrow, they give back: when all went well, when they refuse, and when the run breaks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import base, batch, examples, lora, recomputing, trainer
from torch import nn
from transformers import Trainer, TrainerCallback

from weightlora.errors import CheckpointError, ConfigError
from weightlora.graft.adapters import adapters
from weightlora.graft.depth import checkpoint_blocks
from weightlora.methods import (
    AdaLoRA,
    AdapterMethod,
    Flexora,
    FullFineTuning,
    IncreLoRA,
    LoRA,
    Method,
    NoRA,
    VeRA,
    WeightLoRA,
    WeightLoRAPlus,
)
from weightlora.training import attach, fit

TWO = WeightLoRA(k=2, select_after=2)
OURS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "enable_input_require_grads",
            "_require_grads_hooks", "_require_grads_hook")  # fmt: skip


def of_model(model: nn.Module) -> dict[str, Any]:
    """Hooks, mode and switches of every module that is no adapter's, and what requires a gradient. The very objects."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if "lora" in name or "vera" in name:
            continue
        own = name.removesuffix(".base_layer")
        if hasattr(module, "base_layer"):
            found |= {f"{own}.{hooks} of its adapter": len(getattr(module, hooks)) for hooks in OURS}
            continue
        found |= {f"{own}.{hooks}": list(getattr(module, hooks).items()) for hooks in OURS}
        found |= {f"{own}.{switch}": vars(module).get(switch) for switch in SWITCHES}
        found[f"{own}.training"] = module.training
    found |= {f"{n} trains".replace(".base_layer", ""): p.requires_grad for n, p in model.named_parameters()}
    return found


def of_trainer(each: Trainer) -> dict[str, Any]:
    return {
        "train_dataset": each.train_dataset,
        "eval_dataset": each.eval_dataset,
        "collator": each.data_collator,
        "callbacks": list(each.callback_handler.callbacks),
        "_train_batch_size": each._train_batch_size,
        "model_accepts_loss_kwargs": each.model_accepts_loss_kwargs,
        "compute_loss_func": each.compute_loss_func,
        "args": {field.name: getattr(each.args, field.name) for field in fields(each.args)},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Everything of `after` is what it was; what is gone, went with an adapter."""
    left = {key for key in before.keys() ^ after.keys() if "lora" not in key and "of its adapter" not in key}
    assert not left
    changed = {key: (before[key], after[key]) for key in before.keys() & after.keys() if before[key] != after[key]}
    assert not changed


def users(method: Method = TWO, **config: Any) -> PeftModel:
    """A model as a user may have left it: reentrant checkpointing, hooks of several kinds, one frozen bias trained."""
    model: Any = base("bert", dropout=0.0) if isinstance(method, FullFineTuning) else None
    if isinstance(method, VeRA):
        settings = method.peft_config(LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), [(16, 16)] * 2)
        model = get_peft_model(base("bert", dropout=0.0), settings)
    model = lora(dropout=0.0, **config) if model is None else model
    inner = model if isinstance(method, FullFineTuning) else model.base_model.model
    inner.bert.embeddings.LayerNorm.register_forward_hook(lambda *_: None)
    inner.bert.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
    checkpoint_blocks(inner, {"use_reentrant": True})
    inner.enable_input_require_grads()  # a second one, whose handle hides the first's
    inner.bert.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
    inner.bert.pooler.dense.bias.requires_grad_(True)
    model.eval()
    inner.bert.pooler.train()
    return model  # type: ignore[no-any-return]


class Breaks(TrainerCallback):
    """Ends the run with an error that is none of ours."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def made(out: Path, method: Method = TWO, steps: int = 4, **settings: Any) -> Trainer:
    return trainer(
        out, users(method), steps=steps, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        data=examples(40), **settings,
    )  # fmt: skip


METHODS = [
    WeightLoRA(k=2, select_after=2),
    WeightLoRA(k=1.0, select_after=2),
    WeightLoRAPlus.from_preset("paper", k=2, select_after=2),
    Flexora(batches=2),
    LoRA(),
    FullFineTuning(),
    VeRA(r=4),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'k', '')}")
def test_after_a_run_everything_is_the_users_again(method: Method, tmp_path: Path) -> None:
    settings = recomputing(use_reentrant=True) if method.name == "weightlora" else {}
    each = made(tmp_path, method, **settings)
    model: Any = each.model
    if isinstance(method, AdapterMethod):  # the best checkpoint would lack it
        model.base_model.model.bert.pooler.dense.bias.requires_grad_(False)
    before, asked = of_model(model), of_trainer(each)
    fit(
        each,
        method,
        **({"micro_batch": 1, "final_micro_batch": 2} if isinstance(method, AdapterMethod) else {}),
        measure=method is METHODS[0],
    )
    assert each.state.global_step == 4
    same(before, of_model(model))
    same(asked, of_trainer(each))


FORMS = [TWO, IncreLoRA(), AdaLoRA(), NoRA()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "at"),
    [(TWO, 1), (TWO, 3), *((m, 1) for m in FORMS[1:]), (VeRA(r=4), 1)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_after_an_error_everything_is_the_users_again(method: Method, at: int, tmp_path: Path) -> None:
    """Before the seam and after it; adapters are stock PEFT's, and compute what they computed when the run broke."""
    each = made(tmp_path, method, steps=16)
    each.args.load_best_model_at_end = False
    model: Any = each.model
    before, asked = of_model(model), of_trainer(each)
    breaks = Breaks(at)
    each.add_callback(breaks)
    with pytest.raises(KeyboardInterrupt):
        fit(each, method, measure=False)
    each.remove_callback(breaks)
    same(before, of_model(model))
    same(asked, of_trainer(each))
    if isinstance(method, AdapterMethod):
        assert len(adapters(model)) == (2 if at == 3 else 6)
        assert not any(module.lora_variant for module in model.modules() if hasattr(module, "lora_variant"))
        saved = PeftModel.from_pretrained(base("bert", dropout=0.0), tmp_path / f"checkpoint-{at}").eval()
        model.eval()
        bias = "base_model.model.bert.pooler.dense.bias"  # which PEFT does not save
        saved.get_parameter(bias).data.copy_(model.get_parameter(bias))
        with torch.no_grad():
            assert torch.allclose(model(**batch()).logits, saved(**batch()).logits, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_after_a_refusal_everything_is_the_users_again(tmp_path: Path) -> None:
    each = made(tmp_path)
    model: Any = each.model
    before, asked = of_model(model), of_trainer(each)
    with pytest.raises(ConfigError, match="a micro-batch of 3 does not divide"):
        fit(each, Flexora(batches=2), micro_batch=2, final_micro_batch=3)
    with pytest.raises(CheckpointError):
        fit(each, TWO, resume=tmp_path / "nothing")
    each.args.auto_find_batch_size = True
    asked["args"]["auto_find_batch_size"] = True
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        fit(each, TWO)
    same(before, of_model(model))
    same(asked, of_trainer(each))
    assert each.optimizer is None


@pytest.mark.filterwarnings("ignore")
def test_after_finish_everything_is_the_users_again() -> None:
    model = users()
    model.train()
    before = of_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = attach(model, TWO, optimizer)
    for _ in range(4):
        model(**batch()).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    tuner.finish()
    same(before, of_model(model))
    assert not optimizer._optimizer_step_pre_hooks
    model.base_model.model.disable_input_require_grads()  # its handle is the one of before
    hooks = model.base_model.model.bert.embeddings.word_embeddings._forward_hooks.values()
    assert [hook.__name__ for hook in hooks] == ["<lambda>", "make_inputs_require_grads", "<lambda>"]


@pytest.mark.filterwarnings("ignore")
def test_the_next_adapter_on_the_base_trains(tmp_path: Path) -> None:
    """Reentrant checkpointing asks for inputs that require gradients; ``enable_input_require_grads`` works again."""
    each = trainer(tmp_path, lora("llama", dropout=0.0), steps=4)
    fit(each, TWO, measure=False)
    model: Any = each.model
    plain = model.unload()
    second = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0]))
    checkpoint_blocks(plain, {"use_reentrant": True})
    second.train()
    second(**batch()).loss.backward()
    assert all(p.grad is not None for n, p in second.named_parameters() if "lora_" in n)

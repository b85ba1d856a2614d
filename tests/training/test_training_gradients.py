"""Past the seam every survivor has a gradient: wherever checkpointing was switched on, or the run ends and says who."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tests.builders import adapter_state, base, batches, examples, lora, max_difference, recomputing, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from weightlora.errors import AdapterError, ConfigError, ScheduleError
from weightlora.graft.depth import checkpoint_blocks
from weightlora.methods import DeepestAdapters, Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import attach, fit

SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                         "intermediate_size": 32}  # fmt: skip
TWO = WeightLoRA(k=2, select_after=2)
SETTINGS = [{"every_n_layers": 2}, {"offload": True, "use_reentrant": True}, {"bare": True}]


class Reached(TrainerCallback):
    """At each step: how many trained factors there are, and how many of them have a gradient."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[int, int]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        own = [p for n, p in given["model"].named_parameters() if "lora_" in n and p.requires_grad]
        self.steps[state.global_step + 1] = len(own), sum(p.grad is not None for p in own)


def tokens(head: str) -> list[dict[str, Any]]:
    """Rows for one of the heads."""
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in examples(16)]
    extra = {
        "classes": lambda ids: {"labels": int(ids[0]) % 2},
        "tokens": lambda ids: {"labels": ids % 2},
        "spans": lambda ids: {"start_positions": int(ids[0]) % 8, "end_positions": 7},
    }
    return [{**row, **extra.get(head, lambda ids: {"labels": ids})(row["input_ids"])} for row in rows]


def headed(head: str) -> PeftModel:
    """A model of four blocks with LoRA on its attention, and one of the heads."""
    torch.manual_seed(0)
    bert, llama = BertConfig(**SMALL), LlamaConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    t5 = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    makers: dict[str, Any] = {
        "classes": lambda: base("llama", 4, dropout=0.0),
        "tokens": lambda: BertForTokenClassification(bert),
        "spans": lambda: BertForQuestionAnswering(bert),
        "causal": lambda: LlamaForCausalLM(llama),
        "encoder-decoder": lambda: T5ForConditionalGeneration(t5),
    }
    names = {"classes": "SEQ_CLS", "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS", "causal": "CAUSAL_LM"}
    targets = {"tokens": ["query", "value"], "spans": ["query", "value"], "encoder-decoder": ["q", "v"]}
    config = LoraConfig(
        r=2, target_modules=targets.get(head, ["q_proj", "v_proj"]), task_type=names.get(head, "SEQ_2_SEQ_LM")
    )
    return get_peft_model(makers[head](), config)


def reentrant(model: PeftModel) -> PeftModel:
    """Checkpointing as ``prepare_model_for_kbit_training`` leaves it on the model: no word of reentry, so reentrant."""
    checkpoint_blocks(model.base_model.model, {})
    return model


HEADS = ("classes", "tokens", "spans", "causal", "encoder-decoder")


@pytest.mark.filterwarnings("ignore")  # torch says that use_reentrant should be passed
@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_on_the_model_trains_the_survivors(head: str, tmp_path: Path) -> None:
    """The numbers of the same run without checkpointing, and in a new process that begins after the seam.

    (T5 hands its encoder's output to a block by keyword, and reentrant checkpointing computes something else then.)
    """
    runs = []
    for on in (False, True) if head != "encoder-decoder" else (True,):
        model = reentrant(headed(head)) if on else headed(head)
        each = trainer(
            tmp_path / str(on),
            model,
            steps=4,
            data=tokens(head),
            save_strategy="steps",
            save_steps=3,
        )
        each.add_callback(seen := Reached())
        result = fit(each, TWO, measure=head == "causal")
        runs.append((result.selection, adapter_state(model)))
        said = {name: numbers["kept_activation_bytes"] for name, numbers in result.predicted.items()}
        assert said == {p.name: p.kept_activation_bytes for p in result.phases if head == "causal"}
        assert seen.steps[3] == seen.steps[4] == (4, 4)
    assert runs[0][0] == runs[-1][0]
    assert max_difference(runs[0][1], runs[-1][1]) == 0.0
    again = reentrant(headed(head))
    resumed = trainer(tmp_path / "True", again, steps=4, data=tokens(head))
    resumed.add_callback(seen := Reached())
    fit(resumed, TWO, resume=tmp_path / "True" / "checkpoint-3", measure=False)
    assert seen.steps == {4: (4, 4)}
    assert max_difference(adapter_state(again), runs[-1][1]) == 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method", [TWO, DeepestAdapters(k=2), WeightLoRAPlus(k=2, select_after=2)], ids=lambda m: m.name
)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_qlora_as_everybody_writes_it(kind: str, method: Method, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: QLoRA is not tested here")
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 64}, pad_token_id=0)).save_pretrained(tmp_path / "base")
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**{f"load_in_{kind}": True}), device_map="cpu"
    )
    prepared = prepare_model_for_kbit_training(loaded)
    model = get_peft_model(prepared, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    each = trainer(tmp_path / "run", model, steps=4, data=tokens("causal"))
    each.add_callback(seen := Reached())
    fit(each, method, measure=kind == "4bit")
    assert [seen.steps[step] for step in (3, 4)] == [(4, 4)] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
def test_arguments_that_checkpoint_with_reentry(settings: dict[str, Any], tmp_path: Path) -> None:
    """torch reenters wherever it is told nothing else, and the arguments stay the user's."""
    model = headed("causal")
    each = trainer(tmp_path, model, steps=4, data=tokens("causal"), **recomputing(**settings))
    before = {key: getattr(each.args, key) for key in recomputing(**settings)}
    each.add_callback(seen := Reached())
    fit(each, TWO, measure=False)
    assert seen.steps[3] == seen.steps[4] == (4, 4)
    assert {key: getattr(each.args, key) for key in before} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_switched_model_keeps_its_other_settings(settings: dict[str, Any]) -> None:
    """Which blocks are checkpointed, and by what, is as it was; only reentry is gone."""
    model = headed("causal")
    blocks, settings = model.base_model.model.model.layers, dict(settings)
    if settings.pop("bare", False):
        model.base_model.model._set_gradient_checkpointing(True)
    elif "activation_checkpointing" in recomputing():
        reentry = {"use_reentrant": True} if settings.pop("use_reentrant", False) else {}
        checkpoint_blocks(model.base_model.model, reentry, **settings)
    else:
        pytest.skip("this release of Transformers checkpoints all blocks or none")
    functions = [getattr(block._gradient_checkpointing_func, "func", checkpoint) for block in blocks]
    on = [block.gradient_checkpointing for block in blocks]
    attached(model, DeepestAdapters(k=1))
    assert [block.gradient_checkpointing for block in blocks] == on
    for block, function in zip(blocks, functions, strict=True):
        if block.gradient_checkpointing:
            assert block._gradient_checkpointing_func.func is function
            assert block._gradient_checkpointing_func.keywords["use_reentrant"] is False


def attached(model: nn.Module, method: Method) -> tuple[Any, torch.optim.Optimizer]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return attach(model, method, optimizer), optimizer


def stepped(model: nn.Module, tuner: Any, optimizer: Any, rows: list[dict[str, Any]], to_none: bool = True) -> None:
    model(**{k: torch.stack([torch.as_tensor(row[k]) for row in rows[:4]]) for k in rows[0]}).loss.backward()
    optimizer.step()
    tuner.step()
    optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["classes", "causal"])
def test_attach_trains_the_survivors_of_a_checkpointed_model(head: str) -> None:
    states = []
    for on in (False, True):
        model = reentrant(headed(head)) if on else headed(head)
        tuner, optimizer = attached(model, TWO)
        for _ in range(4):
            stepped(model, tuner, optimizer, tokens(head))
        tuner.finish()
        states.append(adapter_state(model))
    assert max_difference(*states) == 0.0


class OfItsOwn(nn.Module):
    """A block whose own code checkpoints, and says so to nobody."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(self.inner, **kwargs), x, *args, use_reentrant=True)


def hidden_reentry(head: str, told: bool) -> PeftModel:
    model = headed(head)
    inner = model.base_model.model.model
    inner.layers = nn.ModuleList(OfItsOwn(block) for block in inner.layers)
    model.base_model.model.enable_input_require_grads()
    for block in inner.layers if told else ():
        block.gradient_checkpointing = True
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["classes", "causal"])
def test_code_of_its_own_that_says_so_keeps_its_gradients(head: str, tmp_path: Path) -> None:
    each = trainer(tmp_path, hidden_reentry(head, told=True), steps=4, data=tokens(head))
    each.add_callback(seen := Reached())
    fit(each, TWO, measure=False)
    assert seen.steps[3] == seen.steps[4] == (4, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("head", ["classes", "causal"])
def test_a_run_whose_survivors_get_no_gradient_ends(head: str, measure: bool, tmp_path: Path) -> None:
    """With a head torch is silent; without one it says that the loss needs no gradient."""
    each = trainer(tmp_path, hidden_reentry(head, told=False), steps=4, data=tokens(head))
    message = r"no gradient reaches model\.layers\..* at step 3, after the seam: look for reentrant checkpointing"
    with pytest.raises(AdapterError, match=message):
        fit(each, TWO, measure=measure)
    assert each.state.global_step == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to_none", [True, False])
def test_a_loop_whose_survivors_get_no_gradient_ends(to_none: bool) -> None:
    """Gradients of the last step of warm-up, kept as zeros, are not taken for new ones."""
    model = hidden_reentry("classes", told=False)
    tuner, optimizer = attached(model, TWO)
    for _ in range(2):
        stepped(model, tuner, optimizer, tokens("classes"), to_none)
    with pytest.raises(AdapterError, match=r"no gradient reaches .* at step 3, after the seam"):
        stepped(model, tuner, optimizer, tokens("classes"), to_none)


class Now(nn.Module):
    """Two branches; which of them runs is said from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = (nn.Linear(4, 4) for _ in "abc")
        self.branch, self.unused = "a", False

    def forward(self, x: Tensor) -> Tensor:
        if self.unused:
            self.idle(x)
        out: Tensor = self.a(x) if self.branch == "a" else self.b(x)
        return out


@pytest.mark.parametrize("unused", [False, True])
def test_a_module_that_a_step_passes_by_needs_no_gradient(unused: bool) -> None:
    """An expert without a token, a dropped layer; but one that computed for nothing is an error."""
    torch.manual_seed(0)
    net = Now()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["a", "b", "idle"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    tuner = attach(model, DeepestAdapters(k=2), optimizer)  # b and idle
    net.branch, net.unused = "b", unused

    def step() -> None:
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()

    if unused:
        with pytest.raises(AdapterError, match=r"no gradient reaches idle at step 1, .*an output that the loss"):
            step()
    else:
        step()
    watched = [m for m in model.modules() for h in m._forward_hooks.values() if "_note" in getattr(h, "__name__", "")]
    assert not watched  # it was looked at once


def test_a_closure_is_judged_after_its_backward_pass() -> None:
    model = headed("causal")
    tuner, optimizer = attached(model, TWO)
    rows = tokens("causal")
    inputs = {k: torch.stack([torch.as_tensor(row[k]) for row in rows[:4]]) for k in rows[0]}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
        tuner.step()
    assert tuner.finish().k == 2


# Accelerate's own optimizer


def accelerated(before: bool, accumulation: int, everywhere: bool) -> dict[str, Tensor]:
    """A loop as Accelerate's guide writes it; the tuner is attached before or after ``prepare``."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model: Any = lora(dropout=0.0)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    if before:
        tuner = attach(model, TWO, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not before:
        tuner = attach(model, TWO, optimizer)
    stream = batches()
    for _ in range(4 * accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(**next(stream)).loss)
            optimizer.step()
            if everywhere or accelerator.sync_gradients:
                tuner.step()
            optimizer.zero_grad()
    assert tuner.finish().k == 2
    assert len(optimizer.param_groups[0]["params"]) == 2 * 2 + 2
    return adapter_state(model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_optimizer_that_accelerate_has_wrapped(accumulation: int) -> None:
    plain = accelerated(True, accumulation, everywhere=False)
    for before in (True, False):
        made = accelerated(before, accumulation, everywhere=not before)
        assert max_difference(plain, made) == 0.0


def test_a_wrapped_optimizer_must_step_too() -> None:
    accelerator = Accelerator(cpu=True)
    model: Any = lora()
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    tuner = attach(model, TWO, optimizer)
    with pytest.raises(ScheduleError, match="counts optimizer steps; call it once after each"):
        tuner.step()


def test_a_scaler_of_accelerates_is_refused() -> None:
    model: Any = lora()
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = Accelerator(cpu=True).prepare(optimizer)
    optimizer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match="fp16 training scales the gradients"):
        attach(model, TWO, optimizer)
    assert not optimizer.optimizer._optimizer_step_pre_hooks

"""TRL's DPO and reward trainers through the seam: who trains on, and that the reference stays what it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import adapter_state, max_difference, warm
from tests.training.test_training_sft import WORDS, tokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.methods import NoRA, WeightLoRA, WeightLoRAPlus
from weightlora.training import fit

trl = pytest.importorskip("trl")
# TRL's DPO trainer switches checkpointing off for the reference by the old name of the method.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
GROWN = WeightLoRAPlus.from_preset("paper", k=2, select_after=3)
SETTINGS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


def bare(kind: type[PreTrainedModel], **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return kind(
        LlamaConfig(**sizes, **more, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    )  # fmt: skip


def lora(task: str, **more: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type=task, **more)


def pairs(prompt: bool) -> Any:
    from datasets import Dataset

    picks = torch.randint(0, len(WORDS), (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for row in picks:
        words = [WORDS[i] for i in row]
        start = " ".join(words[:3])
        both = {"chosen": " " + " ".join(words[3:6]), "rejected": " " + " ".join(words[6:])}
        rows.append({"prompt": start, **both} if prompt else {key: start + end for key, end in both.items()})
    return Dataset.from_list(rows)


def losses(each: Any) -> Tensor:
    return torch.tensor([x["loss"] for x in each.state.log_history if "loss" in x])


def trained(each: Any, result: Any, later: Later) -> None:
    """Two survivors that go on moving after the seam, the rest gone, every loss a number."""
    assert each.state.global_step == 6
    assert [p.steps for p in result.phases] == [3, 3]
    assert len(losses(each)) == 6
    assert bool(losses(each).isfinite().all())
    model = each.model
    assert len(adapters(model)) == result.selection.k == 2
    assert min(a.rank for a in adapters(model)) > 2
    moving = [key for key in later.state if "lora_" in key and ".default." in key]
    assert len(moving) == sum("lora_" in key and ".default." in key for key in model.state_dict()) == 4
    assert not any(torch.equal(adapter_state(model)[key], later.state[key]) for key in moving)


def dpo(out: Path, model: Any, *, arguments: Any = None, **more: Any) -> Any:
    made = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(out), **{**SETTINGS, **(arguments or {})}),
        train_dataset=pairs(prompt=True),
        processing_class=tokenizer(),
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


def reference(each: Any) -> Tensor:
    """What TRL's own code says of the reference, on the first batch of the data."""
    inputs = each._prepare_inputs(each.data_collator([each.train_dataset[i] for i in range(4)]))
    return torch.cat(each.compute_ref_log_probs(each.model, inputs))


class Later(TrainerCallback):
    """What trains, at the end of the first step after the seam; and the reference's answer at the end of every step."""

    def __init__(self, each: Any, refer: bool = True) -> None:
        self.each, self.refer = each, refer
        self.references: list[Tensor] = []
        self.state: dict[str, Tensor] = {}
        each.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.refer:
            self.references.append(reference(self.each))
        if state.global_step == 4:
            self.state = adapter_state(self.each.model)


@pytest.mark.parametrize("given", ["config", "model"])
def test_dpo(given: str, tmp_path: Path) -> None:
    """Given a config the reference is the bare base; given a model with adapters, TRL adds a copy of them as "ref"."""
    base, config = bare(LlamaForCausalLM), lora("CAUSAL_LM")
    if given == "config":
        each = dpo(tmp_path, base, peft_config=config)
        want = reference(dpo(tmp_path, bare(LlamaForCausalLM), peft_config=lora("CAUSAL_LM")))
    else:
        each = dpo(tmp_path, warm(get_peft_model(base, config), 0.2))
        want = reference(each)
        untouched = {k: v.clone() for k, v in each.model.state_dict().items() if ".ref." in k}
    later = Later(each)
    result = fit(each, GROWN)
    trained(each, result, later)
    assert len(later.references) == 6
    for found in (*later.references, reference(each)):
        assert torch.equal(found, want)
    if given == "model":
        now = {k: v for k, v in each.model.state_dict().items() if ".ref." in k}
        assert max_difference(now, untouched) == 0.0
        assert (each.model.peft_config["ref"].r, each.model.peft_config["default"].r > 2) == (2, True)
        assert config.r == 2
        each.model.delete_adapter("ref")
    # The policy has moved away from the reference, and is an adapter that stock PEFT opens.
    policy = each.model.eval()
    ids = torch.randint(3, 15, (3, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine = policy(input_ids=ids).logits
        with policy.disable_adapter():
            assert float((policy(input_ids=ids).logits - mine).abs().max()) > 1e-3
    export(result, tmp_path / "out")
    stock = PeftModel.from_pretrained(bare(LlamaForCausalLM), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, mine, atol=1e-5)


@pytest.mark.parametrize("given", ["config", "model"])
def test_dpo_leaves_a_frozen_pair_alone(given: str, tmp_path: Path) -> None:
    """At every step TRL asks the reference, and PEFT then lets all factors of the policy require gradients."""
    base, config = bare(LlamaForCausalLM), lora("CAUSAL_LM")
    each = dpo(tmp_path, base, peft_config=config) if given == "config" else dpo(tmp_path, get_peft_model(base, config))
    seen: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            named = each.model.named_parameters()
            seen.append({k: p.detach().clone() for k, p in named if ".default." in k or k.startswith("form_")})

    each.add_callback(Look())
    fit(each, NoRA(calibration_batches=1), measure=False)
    pairs = [key for key in seen[0] if "lora_" in key]
    inner = [key for key in seen[0] if key.startswith("form_")]
    assert (len(pairs), len(inner)) == (12, 12)
    assert all(torch.equal(seen[0][key], seen[-1][key]) for key in pairs)
    assert not any(torch.equal(seen[0][key], seen[-1][key]) for key in inner)
    assert bool(losses(each).isfinite().all())


def test_reward(tmp_path: Path) -> None:
    each = trl.RewardTrainer(
        model=bare(LlamaForSequenceClassification, num_labels=1),
        args=trl.RewardConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=pairs(prompt=False),
        processing_class=tokenizer(),
        peft_config=lora("SEQ_CLS", modules_to_save=["score"]),
    )
    each.remove_callback(PrinterCallback)
    start = adapter_state(each.model)
    later = Later(each, refer=False)
    result = fit(each, GROWN)
    trained(each, result, later)
    head = [key for key in start if "score" in key]
    assert len(head) == 1
    assert not torch.equal(adapter_state(each.model)[head[0]], start[head[0]])
    export(result, tmp_path / "out")
    stock = PeftModel.from_pretrained(bare(LlamaForSequenceClassification, num_labels=1), tmp_path / "out").eval()
    ids = torch.randint(3, 15, (3, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, each.model.eval()(input_ids=ids).logits, atol=1e-5)


def test_dpo_without_a_choice_is_trls_own(tmp_path: Path) -> None:
    plain = dpo(tmp_path / "a", bare(LlamaForCausalLM), peft_config=lora("CAUSAL_LM"))
    plain.train()
    ours = dpo(tmp_path / "b", bare(LlamaForCausalLM), peft_config=lora("CAUSAL_LM"))
    fit(ours, WeightLoRA(k=1.0, select_after=3), engine="stock", measure=False)
    assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) == 0.0
    assert torch.equal(losses(plain), losses(ours))


# what TRL counts inside its losses


def ended(made: Any, fitted: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What was logged, but for times, and the adapters."""
    if fitted:
        result = fit(made, WeightLoRA(k=6, select_after=3), engine="stock")
        assert all(phase.flops_per_step for phase in result.phases)
    else:
        made.train()
    timed = ("runtime", "per_second", "time", "total_flos")
    logged = [
        {k: v for k, v in x.items() if not any(t in k for t in timed) and not math.isnan(v)}
        for x in made.state.log_history
    ]
    return logged, adapter_state(made.model)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo"])
def test_trls_numbers_are_trls_own(kind: str, tmp_path: Path) -> None:
    """Tokens, entropy, accuracy, margins and rewards, with the seam within a window of the log; rewards asked once."""
    from datasets import Dataset

    found, asked = [], []
    prompts = [{"prompt": row["prompt"]} for row in pairs(prompt=True)]
    texts = [{"text": row["chosen"]} for row in pairs(prompt=False)]
    for fitted in (False, True):
        calls: list[int] = []

        def rewards(completions: Any, calls: list[int] = calls, **_: Any) -> list[float]:
            calls.append(len(completions))
            return [float(len(set(text.split()))) for text in completions]

        common: dict[str, Any] = {**SETTINGS, "output_dir": str(tmp_path / str(fitted)), "logging_steps": 2, "seed": 7}
        task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
        model = bare(LlamaForSequenceClassification, num_labels=1) if kind == "reward" else bare(LlamaForCausalLM)
        torch.manual_seed(1)
        given: dict[str, Any] = {"model": get_peft_model(model, lora(task)), "processing_class": tokenizer()}
        if kind == "sft":
            args: Any = trl.SFTConfig(**common, max_length=12)
            made = trl.SFTTrainer(args=args, train_dataset=Dataset.from_list(texts), **given)
        elif kind == "dpo":
            made = trl.DPOTrainer(args=trl.DPOConfig(**common), train_dataset=pairs(prompt=True), **given)
        elif kind == "reward":
            made = trl.RewardTrainer(args=trl.RewardConfig(**common), train_dataset=pairs(prompt=False), **given)
        else:
            args = trl.GRPOConfig(**common, num_generations=4, max_completion_length=4)
            made = trl.GRPOTrainer(args=args, train_dataset=Dataset.from_list(prompts), reward_funcs=rewards, **given)
        made.remove_callback(PrinterCallback)
        found.append(ended(made, fitted))
        asked.append(calls)
    assert found[0][0] == found[1][0]
    assert max_difference(found[0][1], found[1][1]) == 0.0
    assert asked[0] == asked[1]


def test_a_limit_is_refused_where_batches_are_made_by_training(tmp_path: Path) -> None:
    from datasets import Dataset

    args = trl.GRPOConfig(**SETTINGS, output_dir=str(tmp_path), num_generations=4, max_completion_length=4)
    made = trl.GRPOTrainer(
        args=args, train_dataset=Dataset.from_list([{"prompt": "w1 w2"}] * 8), reward_funcs=lambda **_: [1.0] * 4,
        model=get_peft_model(bare(LlamaForCausalLM), lora("CAUSAL_LM")), processing_class=tokenizer(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="GRPOTrainer makes its batches during training; use k"):
        fit(made, WeightLoRA(memory=2**30, select_after=3))

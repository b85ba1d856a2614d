"""What people switch on in TRL's SFT and GRPO: NEFTune, masked losses, packing, a reward by a rule, a reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.builders import adapter_state, max_difference
from tests.training.test_training_sft import tokenizer
from tests.training.test_training_trl import SETTINGS, bare, lora, losses, pairs
from torch import nn
from transformers import LlamaForCausalLM, PrinterCallback

from weightlora.graft.adapters import adapters, base_of, lora_layers
from weightlora.graft.export import export
from weightlora.methods import WeightLoRA
from weightlora.training import fit
from weightlora.training.identity import IN_USE

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
CHOSEN = WeightLoRA(k=2, select_after=3)


def texts() -> list[dict[str, Any]]:
    return [{"text": row["chosen"]} for row in pairs(prompt=False)] * 2


def chats() -> list[dict[str, Any]]:
    said = [(row["prompt"], row["chosen"].strip()) for row in pairs(prompt=True)]
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, both, strict=True)]} for both in said]


def sft(out: Path, rows: list[dict[str, Any]], **arguments: Any) -> Any:
    from datasets import Dataset

    torch.manual_seed(1)
    words = tokenizer()
    words.chat_template = CHAT
    made = trl.SFTTrainer(
        model=get_peft_model(bare(LlamaForCausalLM), lora("CAUSAL_LM")),
        args=trl.SFTConfig(output_dir=str(out), seed=7, **{**SETTINGS, **arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    made.remove_callback(PrinterCallback)
    return made


def apart(each: Any) -> float:
    """The largest difference of logits between a batch of rows in one sequence and each row on its own."""
    batch = each.data_collator([each.train_dataset[i] for i in range(4)])
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 4
    model = each.model.eval()
    with torch.no_grad():
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        alone = [model(input_ids=batch["input_ids"][:, i:j]).logits for i, j in itertools.pairwise(starts)]
    return float((together - torch.cat(alone, dim=1)).abs().max())


MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "NEFTune": (texts, {"neftune_noise_alpha": 5.0}),
    "assistant only": (chats, {"assistant_only_loss": True}),
    "completion only": (lambda: [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(prompt=True)], {}),
    "packed": (texts, {"packing": True, "max_length": 16}),
    "packed, wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding-free": (texts, {"padding_free": True, "max_length": None}),
}
MEASURED = ("NEFTune", "packed")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_trls_own_and_goes_through_the_seam(mode: str, tmp_path: Path) -> None:
    """To the bit where nothing is decided; and with a choice the survivors train on under it."""
    rows, arguments = MODES[mode]
    plain = sft(tmp_path / "a", rows(), **arguments)
    plain.train()  # before the next one is made: that draws random numbers
    all_kept = sft(tmp_path / "b", rows(), **arguments)
    fit(all_kept, WeightLoRA(k=1.0, select_after=3), engine="stock", measure=False)
    assert max_difference(adapter_state(plain.model), adapter_state(all_kept.model)) == 0.0
    assert torch.equal(losses(plain), losses(all_kept))
    chosen = sft(tmp_path / "c", rows(), **arguments)
    result = fit(chosen, CHOSEN, measure=mode in MEASURED)
    assert torch.allclose(losses(plain)[:3], losses(chosen)[:3], atol=1e-4)
    assert [(phase.name, phase.steps) for phase in result.phases] == [("warmup", 3), ("final", 3)]
    assert all(phase.kept_activation_bytes for phase in result.phases) is (mode in MEASURED)
    assert len(adapters(chosen.model)) == 2
    assert len(losses(chosen)) == 6
    assert bool(losses(chosen).isfinite().all())
    hooks = chosen.model.get_input_embeddings()._forward_hooks.values()
    assert not any("neftune" in hook.__name__ for hook in hooks)
    if chosen.padding_free:  # no row sees another one, through the survivors either
        assert apart(chosen) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"assistant_only_loss": True}, ValueError, "the dataset is not conversational"),
        ({"packing": True, "max_length": None}, ValueError, "`max_length` can't be `None`"),
        ({"padding_free": True, "max_length": 12}, ValueError, "`max_length` is not enforced"),
    ],
)
def test_what_trl_refuses_it_refuses_in_its_own_words(
    arguments: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        sft(tmp_path, texts(), **arguments)


@pytest.mark.filterwarnings("ignore:.use_liger_kernel=True. is deprecated:FutureWarning")
def test_liger_says_itself_that_it_is_not_there(tmp_path: Path) -> None:
    """Before the first step, and the model is the one that was given."""
    from transformers.utils import is_liger_kernel_available

    if is_liger_kernel_available():
        pytest.skip("liger-kernel is installed; its kernels need a GPU")
    each = sft(tmp_path, texts(), use_liger_kernel=True)
    kinds = {name: type(module) for name, module in each.model.named_modules()}
    state = {name: value.clone() for name, value in each.model.state_dict().items()}
    with pytest.raises(ImportError, match=r"liger-kernel >= 0\.3\.0 is not available"):
        fit(each, CHOSEN)
    assert {name: type(module) for name, module in each.model.named_modules()} == kinds
    assert max_difference(state, each.model.state_dict()) == 0.0
    assert each.state.global_step == 0
    assert [path.name for path in tmp_path.rglob("*")] == [IN_USE]  # whose folder it is


# reinforcement learning


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A rule: how many different words an answer has."""
    return [float(len(set(text.split()))) for text in completions]


def grpo(out: Path, **arguments: Any) -> Any:
    from datasets import Dataset

    torch.manual_seed(1)
    settings = {**SETTINGS, "num_generations": 4, "max_completion_length": 5, "seed": 7, **arguments}
    made = trl.GRPOTrainer(
        model=get_peft_model(bare(LlamaForCausalLM), lora("CAUSAL_LM")),
        args=trl.GRPOConfig(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in pairs(prompt=True)]),
        reward_funcs=distinct,
        processing_class=tokenizer(),
    )
    made.remove_callback(PrinterCallback)
    return made


class Answering:
    """Which adapters are on, by name, in every pass that writes one more word: only those have a cache."""

    def __init__(self, model: nn.Module) -> None:
        self.on: list[set[str]] = []
        self.model = model
        base_of(model).register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, _model: nn.Module, _args: Any, kwargs: Any) -> None:
        if kwargs.get("past_key_values") is not None:
            layers = lora_layers(self.model, "default")
            self.on.append({path for path, layer in layers if not layer.disable_adapters and not layer.merged})


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_selects_and_answers_with_what_lives(beta: float, tmp_path: Path) -> None:
    """Before the seam all adapters write the answers, after it the survivors; the reference is the bare base."""
    each = grpo(tmp_path, beta=beta)
    seen = Answering(each.model)
    result = fit(each, CHOSEN, measure=False)
    assert result.selection is not None
    assert seen.on[0] == {choice.name for choice in result.selection.choices}
    assert seen.on[-1] == set(result.selection.names)
    assert all(on in (seen.on[0], seen.on[-1]) for on in seen.on)
    assert len(adapters(each.model)) == result.selection.k == 2
    assert [phase.steps for phase in result.phases] == [3, 3]
    rewards = [line["reward"] for line in each.state.log_history if "reward" in line]
    assert len(rewards) == 6
    assert min(rewards) > 0
    if beta:
        kl = [line["kl"] for line in each.state.log_history if "kl" in line]
        assert kl[0] == 0.0  # B = 0: the policy is the base
        assert kl[-1] > 0.0
    export(result, tmp_path / "out")
    ids = torch.randint(3, 15, (3, 6), generator=torch.Generator().manual_seed(1))
    stock = PeftModel.from_pretrained(bare(LlamaForCausalLM), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, each.model.eval()(input_ids=ids).logits, atol=1e-5)


def test_grpo_against_a_reference_is_trls_own_where_nothing_is_decided(tmp_path: Path) -> None:
    plain = grpo(tmp_path / "a", beta=0.1)
    plain.train()
    ours = grpo(tmp_path / "b", beta=0.1)
    fit(ours, WeightLoRA(k=1.0, select_after=3), engine="stock", measure=False)
    assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) == 0.0
    assert torch.equal(losses(plain), losses(ours))

"""TRL's trainer on a causal model, gradient checkpointing on as it is by default there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.builders import adapter_state, max_difference, recomputing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from weightlora.methods import DeepestAdapters, Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import fit

trl = pytest.importorskip("trl")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "over", "hill"]
LAYERS = 4


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*special.values(), *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def sft(out: Path, **arguments: Any) -> Any:
    from datasets import Dataset

    torch.manual_seed(0)
    sizes = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (32, 9), generator=generator).tolist()
    settings = {
        "output_dir": str(out), "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2,
    }  # fmt: skip
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{**settings, **arguments}),
        train_dataset=Dataset.from_list([{"text": " ".join(WORDS[i] for i in row)} for row in picks]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    made.remove_callback(PrinterCallback)
    return made


@contextlib.contextmanager
def depths(made: Any) -> Any:
    """One row a forward pass in training: for the embeddings and each block, whether a gradient goes through."""
    inner = made.model.base_model.model.model
    rows: list[list[bool]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module is inner.embed_tokens:
            rows.append([])
        # Recomputation runs the blocks again, top block first; the row is full by then.
        if len(rows[-1]) <= LAYERS:
            rows[-1].append((output[0] if isinstance(output, tuple) else output).requires_grad)

    hooks = [m.register_forward_hook(note) for m in (inner.embed_tokens, *inner.layers)]
    yield rows
    for hook in hooks:
        hook.remove()


def expected(names: tuple[str, ...]) -> list[bool]:
    first = min(int(name.split(".")[2]) for name in names)
    return [False, *(index >= first for index in range(LAYERS))]


@pytest.mark.parametrize(
    "made", [DeepestAdapters(k=2), WeightLoRA(k=2, select_after=4), WeightLoRAPlus(k=1, select_after=4)]
)
def test_the_backward_pass_stops_at_the_lowest_survivor(made: Method, tmp_path: Path) -> None:
    each = sft(tmp_path)
    assert all(getattr(each.args, key) == value for key, value in recomputing().items())  # TRL's default
    with depths(each) as rows:
        result = fit(each, made, measure=False)
    assert result.selection is not None
    seam = result.seam_step or 0
    assert len(rows) == 10
    # During warm-up gradients reach the embeddings' output, as Transformers and TRL arrange it.
    assert rows[:seam] == [[True] * (LAYERS + 1)] * seam
    assert rows[seam:] == [expected(result.selection.names)] * (10 - seam)
    assert each.state.global_step == 10
    assert result.selection.k == made.to_dict()["k"]


def test_warm_up_to_k_equals_n_is_trls_own_training(tmp_path: Path) -> None:
    plain = sft(tmp_path / "a")
    plain.train()
    ours = sft(tmp_path / "b")
    fit(ours, WeightLoRA(k=1.0, select_after=4), engine="stock")
    assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) == 0.0


def test_checkpointing_changes_nothing_after_the_seam(tmp_path: Path) -> None:
    runs = []
    for name, on in (("a", True), ("b", False)):
        each = sft(tmp_path / name, **dict.fromkeys(recomputing(), on))
        runs.append((fit(each, WeightLoRA(k=2, select_after=4)), each))
    assert runs[0][0].selection == runs[1][0].selection
    assert max_difference(*(adapter_state(each.model) for _, each in runs)) == 0.0

"""``benchmarks/peft_board.py``: an experiment as PEFT's method comparison reads it, and a result as it writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from tests.graft.trainer_run import SIZES, llama
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import peft_board
from weightlora.graft.selection import Choice, Selection

# Of the results in huggingface/peft, method_comparison/MetaMathQA/results, as its utils.py writes them at 0134244.
KEYS = {
    "run_info": {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    },
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
    "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler",
    "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip
NAMES = [name for name, _ in llama().named_modules() if name.endswith(("q_proj", "up_proj"))]


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    Selection(
        method="weightlora", preset="recommended", step=6, why="as a test wants it",
        choices=tuple(
            Choice(name=name, kept=i % 4 == 0, omega=1.0, score=None, rank=4 + 2 * (i == 8), scale=2.0)
            for i, name in enumerate(NAMES)
        ),
    ).save(tmp_path / "chosen" / "selection.json")  # fmt: skip
    return tmp_path / "chosen"


def test_the_experiment_is_a_plain_config_and_says_what_choosing_took(chosen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "lora" / "ours"
    peft_board.write_experiment(chosen, folder, {"optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.1}})
    config = LoraConfig.from_pretrained(str(folder))
    assert config.target_modules == set(NAMES[::4])
    assert (config.r, config.rank_pattern) == (4, {NAMES[8]: 6})
    assert set(json.loads((folder / "training_params.json").read_text(encoding="utf-8"))) <= TRAIN_CONFIG
    assert json.loads((folder / "selection_cost.json").read_text(encoding="utf-8"))["optimizer_steps"] == 6


def test_a_small_run_writes_their_result(chosen: Path, tmp_path: Path, smollm2: Path) -> None:
    folder = tmp_path / "experiments" / "lora" / "ours"
    peft_board.write_experiment(chosen, folder, {})
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}))
    params = peft_board.Params(max_steps=2, eval_steps=1, batch_size=2, generation_kwargs={"max_new_tokens": 2})
    rows = [{"query": f"{i} + 1?", "response": f"It is {i + 1}.\n#### {i + 1}"} for i in range(4)]
    data = {"train": rows, "valid": rows[:1], "test": rows[:2], "texts": ["Some other text."]}
    result = json.loads(peft_board.run(base, tokenizer, folder, data, params).read_text(encoding="utf-8"))
    assert {key: set(part) for key, part in result.items()} == KEYS
    assert set(result["run_info"]["train_config"]) == TRAIN_CONFIG
    assert result["run_info"]["experiment_name"] == "lora/ours"
    info = result["train_info"]
    assert (info["status"], [entry["step"] for entry in info["metrics"]]) == ("success", [1, 2, 2])
    assert {"test accuracy", "train loss", "train samples", "train total tokens", "forgetting"} <= set(
        info["metrics"][-1]
    )
    assert info["file_size"] > 4 * info["num_trainable_params"]

"""A block in a trainer's own file: the trainer reads it, and puts adapters on a small Llama. Prints where they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 24}  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def axolotl(block: dict[str, Any]) -> PeftModel:
    from axolotl.loaders.adapter import _build_peft_lora_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    needed = {"base_model": "llama", "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1,
              "learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "cosine",
              "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}  # fmt: skip
    read = AxolotlInputConfig(**needed, **block)
    model = llama()
    return get_peft_model(model, _build_peft_lora_config(model, DictDefault(read.model_dump(exclude_none=True))))


def llama_factory(block: dict[str, Any]) -> PeftModel:
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    needed = {"model_name_or_path": "llama", "stage": "sft", "do_train": True, "dataset": "rows", "template": "llama3",
              "output_dir": "out", "use_cpu": True}  # fmt: skip
    model_args, _, _, finetuning_args, _ = get_train_args(needed | block)
    model = llama()
    return init_adapter(model.config, model, model_args, finetuning_args, True)


def adapters(model: PeftModel) -> dict[str, tuple[int, float, float]]:
    """Rank, scale and dropout by the module's name."""
    return {
        name.removeprefix("base_model.model."): (
            layer.r["default"], layer.scaling["default"], getattr(layer.lora_dropout["default"], "p", 0.0)
        )
        for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
    }  # fmt: skip


if __name__ == "__main__":
    trainer = {"axolotl": axolotl, "llama-factory": llama_factory}[sys.argv[1]]
    found = [adapters(trainer(yaml.safe_load(Path(path).read_text(encoding="utf-8")))) for path in sys.argv[2:]]
    sys.stdout.write("\n" + json.dumps(found) + "\n")

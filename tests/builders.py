"""Small real models, data sets and trainers that the tests of several rooms share. Nothing here is a stand-in."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 60
LENGTH = 8
QKV: Mapping[str, tuple[str, ...]] = {
    "bert": ("query", "key", "value"),
    "deberta": ("query_proj", "key_proj", "value_proj"),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "bart": ("q_proj", "k_proj", "v_proj"),
}
ALL_LINEAR: Mapping[str, tuple[str, ...]] = {
    "bert": (*QKV["bert"], "attention.output.dense", "intermediate.dense", "[0-9].output.dense"),
    "deberta": (*QKV["deberta"], "attention.output.dense", "intermediate.dense", "[0-9].output.dense"),
    "llama": (*QKV["llama"], "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bart": (*QKV["bart"], "out_proj", "fc1", "fc2"),
}
FAMILIES = tuple(QKV)


def base(family: str, layers: int = 2, *, width: int = 16, dropout: float = 0.1, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised classifier of two classes; the same `seed` gives the same weights.

    The weights are ten times larger than by default, so that what an adapter does can be seen in the logits.
    """
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
             "initializer_range": 0.2}  # fmt: skip
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "bert":
            return BertForSequenceClassification(
                BertConfig(**sizes, **drops, intermediate_size=2 * width, max_position_embeddings=32)
            )
        if family == "deberta":
            return DebertaV2ForSequenceClassification(
                DebertaV2Config(
                    **sizes, **drops, intermediate_size=2 * width, max_position_embeddings=32, type_vocab_size=0,
                    relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
                    pos_att_type=["p2c", "c2p"], position_biased_input=False, pooler_hidden_size=width,
                )
            )  # fmt: skip
        if family == "llama":
            return LlamaForSequenceClassification(
                LlamaConfig(
                    **sizes, intermediate_size=2 * width, num_key_value_heads=1, max_position_embeddings=32,
                    attention_dropout=dropout, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                )
            )  # fmt: skip
        return BartForSequenceClassification(
            BartConfig(
                vocab_size=VOCABULARY, d_model=width, encoder_layers=layers, decoder_layers=layers, dropout=dropout,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=2 * width,
                decoder_ffn_dim=2 * width, max_position_embeddings=32, num_labels=2, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, init_std=0.2, decoder_start_token_id=2, forced_eos_token_id=None,
            )
        )  # fmt: skip


def lora(
    family: str = "bert", layers: int = 2, *, rank: int = 4, dropout: float = 0.1, targets: Sequence[str] | None = None,
    width: int = 16, seed: int = 0, **config: Any,
) -> PeftModel:  # fmt: skip
    """A PEFT model with LoRA on q, k and v; every dropout in it has the same probability."""
    model = base(family, layers, width=width, dropout=dropout, seed=seed)
    settings = LoraConfig(
        **{
            "task_type": "SEQ_CLS", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout,
            "target_modules": list(QKV[family] if targets is None else targets), **config,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return get_peft_model(model, settings)


def warm(model: nn.Module, scale: float = 0.5, seed: int = 5) -> nn.Module:
    """Give every B a value, as training would: at B = 0 many a fault computes the right thing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise)
    return model


def examples(count: int = 64, *, length: int = LENGTH, seed: int = 0) -> list[dict[str, Any]]:
    """Token ids that end with the end-of-sequence token (BART asks for one), and a label the model can learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator)
        ids[-1] = 2
        label = int(ids[0] > VOCABULARY // 2)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.long), "labels": label})
    return rows


def batch(count: int = 4, seed: int = 3) -> dict[str, Tensor]:
    """One batch of :func:`examples`."""
    rows = examples(count, seed=seed)
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def batches(size: int = 4, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Different batches without end."""
    for index in itertools.count():
        yield batch(size, seed=1000 * (seed + 1) + index)


def pairs(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A few combinations of several parameters' values in which any two values of two parameters meet.

    Greedy and without chance: always the combination that brings the most new pairs, the first one of the product on a
    tie.
    """
    product = [tuple(enumerate(case)) for case in itertools.product(*(range(len(each)) for each in values))]
    missing = {pair for case in product for pair in itertools.combinations(case, 2)}
    chosen = []
    while missing:
        best = max(product, key=lambda case: len(missing.intersection(itertools.combinations(case, 2))))
        missing.difference_update(itertools.combinations(best, 2))
        chosen.append(tuple(each[index] for each, (_, index) in zip(values, best, strict=True)))
    return chosen


def long(*cases: Any) -> list[Any]:
    """Cases of a test that are left out for time, see ``pytest --long``. The others go through the same code."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long) for case in cases]


def a_third(cases: Iterable[Any], first: int) -> list[Any]:
    """Every third case from this one on; the others are long.

    Tests that go through the same cases begin at different ones: a case that is long in one is in the suite in another.
    """
    listed = list(cases)
    return [case if number % 3 == first else long(case)[0] for number, case in enumerate(listed)]


def recomputing(**settings: Any) -> dict[str, Any]:
    """Arguments of a trainer that checkpoints, by the name that this release of Transformers has for it."""
    known = {field.name for field in fields(TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, **({f"{name}_kwargs": settings} if settings else {})}


class Spy(TrainerCallback):
    """Notes the learning rate that every optimizer step used, and what the optimizer held."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.held: dict[int, set[int]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.rates[state.global_step + 1] = groups[0]["lr"]
        self.held[state.global_step + 1] = {id(p) for group in groups for p in group["params"]}


def trainer(
    out: Path, model: nn.Module | None = None, *, steps: int = 12, count: int = 32, optimizers: Any = (None, None),
    cls: type[Trainer] = Trainer, data: Any = None, **arguments: Any,
) -> Trainer:  # fmt: skip
    """A stock trainer: 8 steps an epoch unless told otherwise, nothing printed, no checkpoint but those asked for."""
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "weight_decay": 0.01, "data_seed": 7,
    }  # fmt: skip
    made = cls(
        model=lora() if model is None else model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=examples(count) if data is None else data,
        eval_dataset=examples(8, seed=9),
        optimizers=optimizers,
    )
    made.remove_callback(PrinterCallback)
    return made


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that trains: LoRA factors (gates folded in, as saved) and the head."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }


def max_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two states with the same names and shapes."""
    assert a.keys() == b.keys(), set(a) ^ set(b)
    assert a, "nothing to compare"
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's answer without dropout; its mode is given back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    model.train(training)
    return out

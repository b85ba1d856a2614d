"""A selection as an experiment of PEFT's method comparison (MetaMathQA), and that comparison's protocol, run small.

    weightlora select --task gsm8k --data-dir DATA --model smollm2 --k 21 --max-steps 40 --out chosen
    python benchmarks/peft_board.py chosen --experiment out/experiments/lora/weightlora-k21
    python benchmarks/peft_board.py chosen --experiment out/experiments/lora/small --run --data DATA/gsm8k

The folder holds what their runner reads: ``adapter_config.json`` (a plain ``LoraConfig`` with our list,
``rank_pattern`` where ranks differ) and ``training_params.json`` (what differs from their defaults). Choosing took
training steps that their runner does not see; ``selection_cost.json`` says how many.

``--run`` does as their runner does (huggingface/peft, method_comparison/MetaMathQA, read at 026d1e0 and 0134244) with
fewer steps and rows: their prompt, loss over prompt and answer with the first token of padding, AdamW, cosine with a
tenth of warm-up, clipping at 1, greedy answers, the number after "#### " or "The answer is", and the rise of the loss
on other text. It writes their result file; what a CPU has not (memory of an accelerator) is null there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from weightlora import Selection
from weightlora.files import write_text
from weightlora.runs.record import collect_versions, machine
from weightlora.tasks.smollm2 import smollm2_folder

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
WARMUP = 0.1
ANSWERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


@dataclass(frozen=True, kw_only=True)
class Params:
    """Their ``training_params.json``: its names, with their defaults but for what a small machine cannot do."""

    model_id: str = "smollm2"
    dtype: str = "float32"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 8
    max_steps: int = 20
    eval_steps: int = 20
    compile: bool = False
    use_gc: bool = False
    query_template: str = TEMPLATE
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, float] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1})
    lr_scheduler: str = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: dict[str, int] = field(default_factory=lambda: {"max_new_tokens": 96})
    attn_implementation: str | None = None
    init_kv_cache_prefix: str | None = None


Row = dict[str, str]


def read(path: Path, count: int) -> list[Row]:
    """Rows with ``query`` and ``response``, as MetaMathQA's; those of GSM8K become such."""
    rows = [json.loads(line) for line in itertools.islice(path.open(encoding="utf-8"), count)]
    names = {"question": "query", "answer": "response"}
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def number(text: str) -> float | str | None:
    """What an answer comes to: a number where it is one, a fraction too.

    >>> number("so 3 + 4.\\n#### 1,007"), number("The answer is: 1/4."), number("I do not know")
    (1007.0, 0.25, None)
    """
    said = next((text.rpartition(mark)[2] for mark in ANSWERS if mark in text), None)
    if said is None:
        return None
    said = said.strip().split("\n", 1)[0].strip(" .!?$%").replace(",", "")
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?", said)
    if found is None or (found[2] and float(found[2]) == 0):
        return said
    return float(found[1]) / float(found[2] or 1)


def cost(chosen: Path, selection: Selection) -> dict[str, Any]:
    """What the choice took before the board's own training begins."""
    found: dict[str, Any] = {"method": selection.method, "preset": selection.preset, "optimizer_steps": selection.step}
    for name in ("select.json", "config.json"):
        if (chosen / name).is_file():
            found["config"] = json.loads((chosen / name).read_text(encoding="utf-8"))
    if (chosen / "record.json").is_file():
        phases = json.loads((chosen / "record.json").read_text(encoding="utf-8"))["phases"]
        found["phase"] = next(iter(phases), None)
    return found


def write_experiment(chosen: Path, folder: Path, params: dict[str, Any], **overrides: Any) -> LoraConfig:
    """The three files; returns the config."""
    selection = Selection.load(chosen / "selection.json")
    config = selection.lora_config(task_type="CAUSAL_LM", **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    write_text(folder / "training_params.json", json.dumps(params, indent=2) + "\n")
    write_text(folder / "selection_cost.json", json.dumps(cost(chosen, selection), indent=2) + "\n")
    return config


def batches(rows: Sequence[Row], tokenizer: Any, params: Params) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for ever, in the rows' order; the loss takes in prompt, answer and the first token of padding."""
    for start in itertools.count(0, params.batch_size):
        part = [rows[(start + i) % len(rows)] for i in range(params.batch_size)]
        texts = [params.query_template.format(query=row["query"]) + row["response"] for row in part]
        ids = [each[: params.max_seq_length] for each in tokenizer(texts).input_ids]
        batch = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        labels = batch["input_ids"].clone()
        for label, each in zip(labels, ids, strict=True):
            label[len(each) + 1 :] = -100
        yield {**batch, "labels": labels}


@torch.inference_mode()
def accuracy(model: PeftModel, tokenizer: Any, rows: Sequence[Row], params: Params) -> float:
    """The share of rows whose greedy answer comes to the row's number."""
    right = 0
    for start in range(0, len(rows), params.batch_size_eval):
        part = rows[start : start + params.batch_size_eval]
        texts = [params.query_template.format(query=row["query"]) for row in part]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        made = model.generate(**batch, **params.generation_kwargs, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(made, skip_special_tokens=True)
        pairs = [(number(answer), number(row["response"])) for answer, row in zip(answers, part, strict=True)]
        right += sum(said is not None and said == true for said, true in pairs)
    return right / len(rows)


@torch.inference_mode()
def text_loss(model: PeftModel, tokenizer: Any, texts: Sequence[str], params: Params) -> float:
    """Nats per token of other text."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=params.max_seq_length, return_tensors="pt").input_ids
        logits = model(input_ids=ids).logits[0, :-1]
        total += cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


def train(model: PeftModel, tokenizer: Any, data: dict[str, Any], params: Params) -> dict[str, Any]:
    """Their ``train_info``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **params.optimizer_kwargs)  # type: ignore[arg-type]
    warm = int(WARMUP * params.max_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=warm, num_training_steps=params.max_steps)
    before = text_loss(model.eval(), tokenizer, data["texts"], params) if data["texts"] else None
    metrics: list[dict[str, Any]] = []
    losses: list[float] = []
    tokens, train_time = 0, 0.0
    for step, batch in enumerate(itertools.islice(batches(data["train"], tokenizer, params), params.max_steps), 1):
        start = time.perf_counter()
        loss = model.train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_norm_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int(batch["attention_mask"].sum())
        train_time += time.perf_counter() - start
        print(f"step {step} of {params.max_steps}: loss {losses[-1]:.4f}", flush=True)
        if step % params.eval_steps == 0 and data["valid"]:
            scored = accuracy(model.eval(), tokenizer, data["valid"], params)
            recent = losses[-params.eval_steps :]
            metrics.append({"step": step, "valid accuracy": scored, "train loss": sum(recent) / len(recent),
                            "train samples": step * params.batch_size, "elapsed time": train_time})  # fmt: skip
    after = text_loss(model.eval(), tokenizer, data["texts"], params) if data["texts"] else None
    recent = losses[-params.eval_steps :]
    metrics.append({
        "step": params.max_steps, "test accuracy": accuracy(model, tokenizer, data["test"], params),
        "train loss": sum(recent) / len(recent), "train samples": params.max_steps * params.batch_size,
        "train total tokens": tokens, "forgetting": None if after is None or before is None else after - before,
    })  # fmt: skip
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "accelerator_memory_reserved_avg": None, "accelerator_memory_max": None,
        "accelerator_memory_reserved_99th": None, "train_time": train_time, "file_size": None,
        "num_trainable_params": trainable, "num_total_params": total, "status": "success", "metrics": metrics,
    }  # fmt: skip


def run(base: PreTrainedModel, tokenizer: Any, folder: Path, data: dict[str, Any], params: Params) -> Path:
    """Train and score the experiment in `folder` as the board does; returns the result file, beside the experiments."""
    began = datetime.now(timezone.utc)
    start = time.perf_counter()
    transformers.set_seed(params.seed)
    random.seed(params.seed)
    config = LoraConfig.from_pretrained(str(folder))
    model = get_peft_model(base, config, autocast_adapter_dtype=params.autocast_adapter_dtype)
    assert isinstance(model, PeftModel)
    info = train(model, tokenizer, data, params)
    model.save_pretrained(str(folder / "adapter"))
    info["file_size"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    name = f"{folder.parent.name}/{folder.name}"
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain["base_model_name_or_path"] = params.model_id  # not the folder where this machine has it
    result = {
        "run_info": {
            "created_at": began.isoformat(timespec="seconds"), "total_time": time.perf_counter() - start,
            "experiment_name": name, "peft_branch": None, "train_config": vars(params), "peft_config": plain,
            "error_msg": "",
        },
        "train_info": info,
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {
                f"{each.__name__}-version": each.__version__ for each in (transformers, peft, datasets, torch)
            },
            "system_info": {"system": platform.system(), "machine": platform.machine(), "accelerator": None},
            "pytorch_info": torch.__config__.show(),
        },
    }  # fmt: skip
    return write_text(folder.parents[1] / f"{name.replace('/', '--')}.json", json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", type=Path, nargs="?", help="what `weightlora select` or `train` wrote")
    parser.add_argument("--experiment", type=Path, help="experiments/<peft method>/<name>")
    parser.add_argument("--rank", type=int, help="one rank for all, alpha twice that (default: as selected)")
    parser.add_argument("--learning-rate", type=float, help="default: the board's 1e-4")
    parser.add_argument("--run", action="store_true", help="train and score it here, on SmolLM2")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and test.jsonl (or validation.jsonl)")
    parser.add_argument("--texts", type=Path, help="JSONL with `document`: other text, for forgetting")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--test-rows", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--result", type=Path, help="also write the run with what choosing took and where it ran")
    given = parser.parse_args()
    if given.chosen is None or given.experiment is None:
        print("SKIPPED: there is no selection to take there; name one, and --experiment")
        return
    ours: dict[str, Any] = {}
    if given.learning_rate is not None:
        ours["optimizer_kwargs"] = {"lr": given.learning_rate, "weight_decay": 0.1}
    ranked = {} if given.rank is None else {"r": given.rank, "lora_alpha": 2 * given.rank, "rank_pattern": {},
                                            "alpha_pattern": {}}  # fmt: skip
    write_experiment(given.chosen, given.experiment, ours, **ranked)
    print(f"experiment: {given.experiment}")
    if not given.run:
        return
    if given.data is None:
        parser.error("--run needs --data")
    params = Params(max_steps=given.max_steps, eval_steps=given.max_steps,
                    generation_kwargs={"max_new_tokens": given.max_new_tokens}, **ours)  # fmt: skip
    test = next(path for path in (given.data / "test.jsonl", given.data / "validation.jsonl") if path.is_file())
    texts = [] if given.texts is None else [row["document"] for row in read(given.texts, 8)]
    data = {"train": read(given.data / "train.jsonl", params.max_steps * params.batch_size), "valid": [],
            "test": read(test, given.test_rows), "texts": texts}  # fmt: skip
    folder = smollm2_folder()
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = run(base, AutoTokenizer.from_pretrained(folder), given.experiment, data, params)
    print(f"result: {written}")
    if given.result is not None:
        cost_file = given.experiment / "selection_cost.json"
        whole = {"benchmark": "peft_board", "command": f"python benchmarks/peft_board.py {shlex.join(sys.argv[1:])}",
                 "selection_cost": json.loads(cost_file.read_text(encoding="utf-8")),
                 "result": json.loads(written.read_text(encoding="utf-8")),
                 "test_rows": len(data["test"]), "versions": collect_versions(), "machine": machine()}  # fmt: skip
        write_text(given.result, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A whole fit on a device: warm-up, seam, growth, a resumed run that ends alike, and torch.compile; and what each cost.

    python benchmarks/gpu_fit.py --shape llama-512 --steps 60 --out fit.json
    python benchmarks/gpu_fit.py --shape smollm2-weights --methods lora weightlora random --seeds 0 1 2 --out words.json

Rows of text are this Python's own documentation, as bytes (or SmolLM2's tokens), so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import pydoc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

import weightlora as wl
from adapter_path import provenance, write
from benchlib.shapes import ALL_LLAMA, SHAPES, build
from weightlora.methods.baselines import RandomAdapters

WEIGHTS = "smollm2-weights"
HELD_OUT = 8


def methods(k: int, steps: int) -> dict[str, wl.Method]:
    after = max(1, steps // 5)
    return {
        "lora": wl.LoRA(),
        "weightlora": wl.WeightLoRA(k=k, select_after=after),
        "weightlora+": wl.WeightLoRAPlus(k=k, select_after=after),
        "random": RandomAdapters(k=k),
    }


def base(args: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    """The frozen model, and rows of token ids."""
    text = "\n".join(
        pydoc.plain(pydoc.render_doc(name)) for name in ("argparse", "json", "logging", "pathlib", "typing")
    )
    if args.shape == WEIGHTS:
        from weightlora.tasks.smollm2 import smollm2_folder

        folder = smollm2_folder()
        ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        shape = replace(SHAPES[args.shape], dtype=torch.float32)
        ids = torch.tensor(list(text.encode())) % shape.sizes["vocab_size"]
        model, _ = build(shape, "cpu", 0)
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    return model, list(rows)


def trainer_of(args: argparse.Namespace, out: Path, seed: int, **more: Any) -> Trainer:
    set_seed(seed)
    model, rows = base(args)
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=rf".*\.(?:{'|'.join(ALL_LLAMA)})")
    examples = [{"input_ids": row, "labels": row} for row in rows]
    made = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(out), max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-3,
            bf16=True, use_cpu=args.device == "cpu", report_to="none", disable_tqdm=True, logging_steps=args.steps,
            seed=seed, data_seed=seed, dataloader_num_workers=0,
            **{"save_strategy": "no", **more},
        ),
        train_dataset=examples[HELD_OUT:],
        eval_dataset=examples[:HELD_OUT],
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def row(args: argparse.Namespace, name: str, seed: int, **more: Any) -> dict[str, Any]:
    """One fit: what was kept, what each phase cost, and the loss on held-out rows."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, Path(folder), seed, **more)
        result = wl.fit(trainer, methods(args.k, args.steps)[name], engine=args.engine)
        loss = trainer.evaluate()["eval_loss"]
    kept = None if result.selection is None else [c.name for c in result.selection.choices if c.kept]
    phases = [
        {"name": p.name, "steps": p.steps, "seconds": p.seconds, "trainable_params": p.trainable_params,
         "kept_activation_bytes": p.kept_activation_bytes, "peak_memory_bytes": p.peak_memory_bytes}
        for p in result.phases
    ]  # fmt: skip
    return {
        "method": name,
        "seed": seed,
        "kept": kept,
        "eval_loss": loss,
        "phases": phases,
        **{k: str(v) for k, v in more.items()},
    }


def resumed(args: argparse.Namespace) -> dict[str, Any]:
    """Largest difference of what trained, between a run and one that goes on from its last checkpoint but one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for resume in (False, True):
            every = max(1, args.steps // 3)
            trainer = trainer_of(args, Path(folder), 0, save_strategy="steps", save_steps=every)
            checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            method = methods(args.k, args.steps)["weightlora+"]
            result = wl.fit(trainer, method, resume=checkpoints[-2] if resume else False, engine=args.engine)
            found.append({n: p.detach().float().cpu() for n, p in result.model.named_parameters() if "lora_" in n})
    one, other = found
    assert one.keys() == other.keys()
    return {"largest_difference": max(float((one[name] - other[name]).abs().max()) for name in one)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*sorted(n for n in SHAPES if SHAPES[n].targets == ALL_LLAMA), WEIGHTS],
                        default="llama-512")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(methods(1, 5)), default=["lora", "weightlora", "weightlora+"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--resume", action="store_true", help="compare with a run that was resumed")
    parser.add_argument("--compile", metavar="BACKEND", help="weightlora+ once more by torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    result: dict[str, Any] = {"benchmark": "gpu_fit", "shape": args.shape, "rows": [], "provenance": provenance(args)}

    def add(**more: Any) -> None:
        result.update(more)
        write(args.out, result)  # at once: the next may run out of time

    for seed in args.seeds:
        for name in args.methods:
            add(rows=[*result["rows"], row(args, name, seed)])
            print({key: value for key, value in result["rows"][-1].items() if key != "kept"}, flush=True)
    if args.resume:
        add(resumed=resumed(args))
        print(f"resumed: {result['resumed']}", flush=True)
    if args.compile:
        add(compiled=row(args, "weightlora+", 0, torch_compile=True, torch_compile_backend=args.compile))
        print(f"compiled: loss {result['compiled']['eval_loss']}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

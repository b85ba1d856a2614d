"""What gradient checkpointing saves, what fewer adapters save, and what both save together: bytes and operations.

    python benchmarks/checkpointing.py

Nothing is computed: tensors have a shape and no memory. Bytes are the planner's, for CUDA's kernels
(`plan_accuracy.py` compares it with counts); operations are torch's count of one forward and backward pass, with what
is computed a second time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from adapter_path import Bench, provenance, write
from benchlib.shapes import SHAPES, Shape, resized
from benchlib.verdicts import HALF
from plan_accuracy import predicted
from weightlora.cost import Estimate, Phase, Setting, Traced
from weightlora.graft.adapters import adapters
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest

RESULTS = Path(__file__).parent / "results"
# By whom half of the memory was filled; for other shapes the upper half of the adapters stands in.
STUDIES = {"smollm2": "placement-smollm2-gsm8k.json", "minilm": "placement-minilm-docstrings.json"}
DEFAULT = {"minilm": (16, 48), "smollm2": (8, 96), "deberta-v3-base": (32, 128), "llama-3-8b": (1, 2048)}


def chosen(name: str, names: Sequence[str]) -> dict[str, list[str]]:
    """All adapters, and fewer of them: by the study where there is one, and the upper half."""
    sets = {"all": list(names)}
    if name in STUDIES:
        study = json.loads((RESULTS / STUDIES[name]).read_text())
        indices = next(t["set"] for t in study["trials"] if t["label"] == HALF)
        endings = [study["adapters"][i]["name"].partition("layer")[2] for i in indices]
        sets["credit"] = [one for one in names if one.partition("layer")[2] in endings]
        assert len(sets["credit"]) == len(indices)
    return sets | {"upper half": list(names[len(names) // 2 :])}


def rows(name: str, shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each set of one model, with and without checkpointing."""
    traced, _ = predicted(shape, argparse.Namespace(**vars(args) | {"device": "cuda"}))  # its kernels
    with FakeTensorMode():
        return list(counted(name, shape, args, traced))


def counted(name: str, shape: Shape, args: argparse.Namespace, traced: Traced) -> Iterator[dict[str, Any]]:
    """The rows of :func:`rows`; to be called where tensors are fake."""
    bench = Bench(replace(shape, dtype=torch.float32), args)  # fake tensors cannot change their dtype
    # Their values would be asked for: by attention, and by the loss of DeBERTa's head.
    asked = {"attention_mask"} | ({"labels"} if shape.model.endswith("Classification") else set())
    batch = {key: value for key, value in bench.batch.items() if key not in asked}
    index = {adapter.name: adapter.index for adapter in adapters(bench.model)}
    for checkpointing in (False, True):
        estimate = Estimate(traced.model, traced.at, Setting(checkpointing=checkpointing))
        if checkpointing:
            checkpoint_blocks(bench.root)  # type: ignore[arg-type]
            end_backward_at_lowest(bench.model)
        for label, live in chosen(name, list(index)).items():
            phase = Phase(name=label, live=tuple(sorted(index[one] for one in live)))
            cost = estimate.cost(phase, shape.batch)
            with bench.ours(live), FlopCounterMode(display=False) as counter:
                out = bench.model(**batch)
                (out.logits.sum() if out.loss is None else out.loss).backward()
            bench.model.zero_grad()
            yield {
                "shape": name, "batch": shape.batch, "length": shape.length, "dtype": str(shape.dtype), "set": label,
                "adapters": len(live), "checkpointing": checkpointing, "total": cost.total,
                "activations": cost.activations + cost.recomputed, "operations": counter.get_total_flops(),
            }  # fmt: skip


def shares(row: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    """Of what LoRA on all needs without checkpointing."""
    whole = next(one for one in found if one["shape"] == row["shape"])
    return " | ".join(f"{row[key] / whole[key]:.2f}x" for key in ("activations", "total", "operations"))


def show(found: Sequence[dict[str, Any]]) -> None:
    print("| model | adapters | checkpointing | activations | all memory | operations |\n|---|---|---|---|---|---|")
    for row in found:
        again = "yes" if row["checkpointing"] else "no"
        print(f"| {row['shape']} | {row['set']}, {row['adapters']} | {again} | {shares(row, found)} |")


def settings(rank: int) -> argparse.Namespace:
    """What :class:`Bench` asks for."""
    return argparse.Namespace(
        device="cpu", seed=0, rank=rank, dropout=0.0, adapter_dtype="float32", autocast=False, engine="autograd",
        k_random=None, k_deepest=None, names=None,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(DEFAULT), nargs="+", default=list(DEFAULT))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpointing.json")
    args = parser.parse_args(argv)
    wanted, found = settings(args.rank), []
    for name in args.shape:
        batch, length = DEFAULT[name]
        found += rows(name, resized(SHAPES[name], {}, layers=None, batch=batch, length=length), wanted)
    show(found)
    result = {"benchmark": "checkpointing", "rows": found, "provenance": provenance(wanted)}
    write(args.out, result)
    return result


if __name__ == "__main__":
    main()

"""What LoRA's adapters cost over the frozen model: bytes kept for backward, FLOPs, wall time; ours beside stock PEFT's.

    python benchmarks/adapter_path.py --shape deberta-v3-base --dropout 0.05
    python benchmarks/adapter_path.py --shape llama-3-8b --device cuda --seconds 120

Every row runs on the same model and batch. Counted figures (bytes, FLOPs) are exact and the same on any machine.
Times are medians of rounds in which every row takes its turn, and are given as a ratio to stock PEFT in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

import weightlora
from benchlib.clocks import clock, summary
from benchlib.shapes import SHAPES, Shape, build, resized
from weightlora.cost.measure import StepCost, isolated_rng, step_cost
from weightlora.graft.adapters import adapters, factors, lora_layers
from weightlora.graft.fast import fast_path, stock_path
from weightlora.graft.forms import Gates
from weightlora.ops import engine, why_no_triton


class DenseVariant(LoraVariant):  # type: ignore[misc]
    """The published code's forward, re-created: the dense update is built and multiplied with x, gate 0 or not."""

    is_gate = True

    def __init__(self, device: torch.device) -> None:
        self.gate = torch.ones((), device=device, requires_grad=True)

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        A, B = factors(module, active_adapter)
        delta = self.gate * (B @ A) * module.scaling[active_adapter]
        return result + F.linear(x.to(delta.dtype), delta).to(result.dtype)


class Bench:
    """One model, one batch; each row is a context in which the model computes that row's way."""

    def __init__(self, shape: Shape, args: argparse.Namespace) -> None:
        model, self.batch = build(shape, args.device, args.seed)
        pattern = rf".*\.(?:{'|'.join(shape.targets)})"
        config = LoraConfig(r=args.rank, lora_alpha=4 * args.rank, lora_dropout=args.dropout, target_modules=pattern)
        self.model = get_peft_model(model, config, autocast_adapter_dtype=args.adapter_dtype == "float32")
        self.root, self.shape, self.args = model, shape, args
        self.layers = dict(lora_layers(self.model, "default"))
        with torch.no_grad():  # B = 0 is a special case of the gradients; a benchmark should not sit on it
            for layer in self.layers.values():
                factors(layer, "default")[1].normal_(std=0.02)
        names = [adapter.name for adapter in adapters(self.model)]
        self.random = random.Random(args.seed).sample(names, min(args.k_random or shape.k_random, len(names)))
        self.deepest = names[-min(args.k_deepest or shape.k_deepest, len(names)) :]
        self.named = [name for name in names if re.search(args.names or shape.named, name)]
        self.engine = args.engine

    def rows(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        rows: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "bare": self.bare,
            "free": self.free,
            "stock": lambda: self.stock(self.layers),
            "ours": lambda: self.ours(self.layers),
            "ours-gated": self.gated,
            "dense": self.dense,
            "full": self.full,
        }
        for kind, live in (("random", self.random), ("deepest", self.deepest), ("named", self.named)):
            if live:  # a model cut short may have none of the names
                rows[f"ours-{kind}-{len(live)}"] = functools.partial(self.ours, live)
        rows[f"stock-deepest-{len(self.deepest)}"] = functools.partial(self.stock, self.deepest)
        return rows

    def loss(self) -> Tensor:
        device = self.args.device.split(":")[0]
        with torch.autocast(device, torch.bfloat16, enabled=self.args.autocast):
            return self.model(**self.batch).loss  # type: ignore[no-any-return]

    def step(self) -> None:
        """Forward and backward; gradients are dropped again."""
        self.loss().backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def stock(self, live: Sequence[str] | dict[str, LoraLayer]) -> Iterator[None]:
        """Only `live` is there; the others' base layers stand in their places, as after disconnecting."""
        wanted = set(live)
        for path, layer in self.layers.items():
            parent, _, child = path.rpartition(".")
            setattr(self.root.get_submodule(parent), child, layer if path in wanted else layer.get_base_layer())
        try:
            yield
        finally:
            for path, layer in self.layers.items():
                parent, _, child = path.rpartition(".")
                setattr(self.root.get_submodule(parent), child, layer)

    @contextlib.contextmanager
    def ours(self, live: Sequence[str] | dict[str, LoraLayer]) -> Iterator[None]:
        with self.stock(live):
            changed = fast_path(self.model, engine_name=self.engine)
            assert changed == len(live)
            try:
                yield
            finally:
                stock_path(self.model)

    @contextlib.contextmanager
    def gated(self) -> Iterator[None]:
        gates = Gates(self.model, engine_name=self.engine)
        try:
            yield
        finally:
            gates.detach()

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.lora_variant["default"] = DenseVariant(factors(layer, "default")[0].device)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.lora_variant["default"]

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """No adapter; the gradient goes down to the embeddings' output and stops there."""
        tables = [module for module in self.root.modules() if isinstance(module, nn.Embedding)]
        hooks = [table.register_forward_hook(lambda _m, _i, out: out.requires_grad_()) for table in tables]
        with self.stock(()):
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Adapters at no cost: no arithmetic of theirs, but every output that they would change is differentiated.

        The bound of every adapter path. Where a projection is also applied to something else than the hidden states (to
        DeBERTa's relative positions), its adapter needs gradients there that the bare base never computes.
        """

        def differentiated(_module: nn.Module, _given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out if out.requires_grad else out.requires_grad_()

        hooks = [layer.get_base_layer().register_forward_hook(differentiated) for layer in self.layers.values()]
        with self.stock(()):
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        with self.stock(()):
            self.root.requires_grad_(True)
            try:
                yield
            finally:
                self.root.requires_grad_(False)


def floor_bytes(bench: Bench) -> int:
    """What no adapter path that trains every adapter can go below, counted in one forward of the bare base.

    The union, each storage once, of what the bare base keeps and one copy of each distinct adapter input in the base's
    own dtype; and h = x A^T, (tokens, r), of every adapter call.
    """
    known = {t.untyped_storage().data_ptr() for t in (*bench.model.parameters(), *bench.model.buffers())}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []
    inputs: dict[tuple[int, int], int] = {}
    products = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    def watch(layer: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        A = factors(layer, "default")[0]

        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal products
            x = given[0].detach()
            alive.append(x)
            inputs[x.untyped_storage().data_ptr(), x.storage_offset()] = x.numel() * bench.shape.dtype.itemsize
            products += x.numel() // x.shape[-1] * A.shape[0] * A.element_size()

        return hook

    hooks = [layer.get_base_layer().register_forward_pre_hook(watch(layer)) for layer in bench.layers.values()]
    try:
        with isolated_rng(), bench.bare(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = bench.loss()
    finally:
        for hook in hooks:
            hook.remove()
    del loss
    extra = sum(size for (storage, _), size in inputs.items() if storage not in storages and storage not in known)
    return sum(storages.values()) + extra + products


def count(bench: Bench, names: Sequence[str]) -> dict[str, StepCost]:
    """Kept bytes and FLOPs of each row."""
    costs = {}
    for name in names:
        with bench.rows()[name]():
            costs[name] = step_cost(bench.model, bench.loss)
    return costs


def on_cuda(bench: Bench, name: str) -> dict[str, int]:
    """Peak memory and the number of kernels of one step of a row; nothing without CUDA."""
    if not bench.args.device.startswith("cuda"):
        return {}
    with bench.rows()[name]():
        bench.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        bench.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            bench.step()
            torch.cuda.synchronize()
        kernels = sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return {"peak_memory_bytes": peak, "kernels": kernels}


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to run it again and to judge the figures."""
    source, here = Path(weightlora.__file__).parent, Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted((*source.glob("ops/*.py"), *source.glob("graft/*.py"), *here.glob("**/*.py"))):
        digest.update(file.read_bytes())
    packages = {module.__name__: module.__version__ for module in (torch, transformers, peft, weightlora)}
    if why_no_triton() is None:
        packages["triton"] = version("triton")
    cuda = args.device.startswith("cuda")
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **packages},
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "code_sha256": digest.hexdigest(),
    }


def chosen(names: Iterable[str], starts: Sequence[str] | None) -> list[str]:
    """The names that begin with one of `starts`, or are one that ends in $; all where none is given."""
    return [name for name in names if not starts or any(f"{name}$".startswith(start) for start in starts)]


def table(bench: Bench, names: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Everything measured, a dict per row; a row that a CUDA device cannot hold says so, and the others go on."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            cost = count(bench, [name])[name]
            rows[name] = {"kept_activation_bytes": cost.kept_activation_bytes, "flops": cost.flops}
            rows[name] |= on_cuda(bench, name)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows[name] = {"out_of_memory": True}
    fits = [name for name in chosen(names, bench.args.clock) if "out_of_memory" not in rows[name]]
    if seconds > 0 and fits:
        timed = {name: bench.rows()[name] for name in fits}
        cuda = bench.args.device.startswith("cuda")
        samples = clock(timed, bench.step, seconds, cuda=cuda, rounds=bench.args.rounds)
        for name, more in summary(
            samples, bench.batch["input_ids"].numel(), ("stock", "bare", "free", "dense")
        ).items():
            rows[name] |= more
    return rows


def show(name: str, row: dict[str, Any]) -> None:
    if "out_of_memory" in row:
        print(f"{name:20} does not fit on this device", flush=True)
        return
    line = f"{name:20} {row['kept_activation_bytes'] / 2**20:9.1f} MiB {row['flops'] / 1e9:9.1f} GFLOP"
    if "seconds_median" in row:
        line += f" {row['seconds_median']:8.3f} s ({row['rounds']} rounds, {row['disturbed']} disturbed)"
    if "times_faster_than_stock" in row:
        line += f"  {row['times_faster_than_stock']:5.2f}x of stock, CPU {row['cpu_times_faster_than_stock']:5.2f}x"
    if "peak_memory_bytes" in row:
        line += f"  peak {row['peak_memory_bytes'] / 2**30:6.2f} GiB, {row['kernels']} kernels"
    print(line, flush=True)


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="minilm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto", help="of our rows: auto, autograd, triton or reference")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters; the model's own is 0")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--adapter-dtype", choices=["float32", "base"], default="float32", help="PEFT's default: float32"
    )
    parser.add_argument("--autocast", action="store_true", help="run the forward under bfloat16 autocast")
    parser.add_argument("--batch", type=int, help="default: the shape's")
    parser.add_argument("--length", type=int, help="tokens of a row; default: the shape's")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a machine that cannot hold it")
    parser.add_argument("--size", nargs="+", metavar="NAME=N", help="other sizes of the model's config, for a trial")
    parser.add_argument("--k-random", type=int, help="survivors chosen at random")
    parser.add_argument("--k-deepest", type=int, help="survivors in the highest layers")
    parser.add_argument("--names", help="regular expression: survivors by name")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows, by the start of their names; stock$: no other")
    parser.add_argument("--clock", nargs="+", metavar="ROW", help="rows to time, of those; default: all")
    parser.add_argument("--seconds", type=float, default=0.0, help="time for the clock; 0: count only")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many, however long they take")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/adapter-path-SHAPE-DEVICE-....json")
    return parser.parse_args(argv)


def shape_of(args: argparse.Namespace) -> Shape:
    """The chosen shape with what the command line changes of it."""
    changes = dict(pair.split("=", 1) for pair in args.size or ())
    return resized(
        SHAPES[args.shape],
        {key: int(value) for key, value in changes.items()},
        layers=args.layers,
        batch=args.batch,
        length=args.length,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(shape_of(args), args)
    names = chosen(bench.rows(), args.only)
    rows = table(bench, names, args.seconds)
    floor = floor_bytes(bench)
    for name, row in rows.items():
        show(name, row)
    print(f"{'floor, all adapters':20} {floor / 2**20:9.1f} MiB   (n = {len(bench.layers)})")
    result = {
        "benchmark": "adapter_path", "shape": args.shape, "device": args.device, "dtype": str(bench.shape.dtype),
        "adapter_dtype": args.adapter_dtype, "autocast": args.autocast, "batch": bench.shape.batch,
        "length": bench.shape.length, "sizes": bench.shape.sizes, "rank": args.rank, "dropout": args.dropout,
        "engine": args.engine, "computed_by": engine(args.engine).__module__,
        "n": len(bench.layers), "floor_bytes": floor, "rows": rows,
        "survivors": {"random": bench.random, "deepest": bench.deepest, "named": bench.named},
        "provenance": provenance(args),
    }  # fmt: skip
    tags = [args.shape, args.device.split(":")[0], f"dropout{args.dropout:g}"]
    tags += ["autocast"] * args.autocast + [f"batch{args.batch}"] * bool(args.batch)
    write(args.out or Path(__file__).parent / "results" / f"adapter-path-{'-'.join(tags)}.json", result)
    return result


if __name__ == "__main__":
    main()

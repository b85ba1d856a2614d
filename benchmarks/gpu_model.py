"""What a step should take on an H200, before one is there: bare, stock PEFT, ours; and what limits each kernel.

    python benchmarks/gpu_model.py
    python benchmarks/gpu_model.py --layers 2

The base and stock PEFT are counted: one forward and backward over tensors without data, every operation of torch one
kernel that reads its inputs and writes its outputs once. Our kernels are described by their grids and by what their
binaries hold (results/gpu-binaries.json). A kernel takes as long as the slowest of memory, matrix units and
instruction issue needs, with the share of the device that its grid fills. It is a model: no cache, no overlap, no host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapter_path import write
from benchlib.roofline import H200, Device, Launch, counted, total
from benchlib.shapes import SHAPES, Shape, build, resized
from weightlora.ops import triton_path

RESULTS = Path(__file__).parent / "results"
TARGET = "sm_90"
WARPS = 4
# Shape, batch, dtype of the adapters, dropout.
CASES = [
    ("llama-3-8b", 1, "float32", 0.0),
    ("llama-3-8b", 1, "float32", 0.05),
    ("llama-3-8b", 1, "base", 0.0),
    ("deberta-v3-base", 64, "float32", 0.0),
    ("deberta-v3-base", 64, "float32", 0.05),
]
Key = tuple[str, str, str, int, bool, bool, bool]  # the fields of benchlib.binaries.Variant


def binaries() -> dict[Key, dict[str, Any]]:
    """What was read of each kernel's machine code, by what tells variants apart."""
    rows = json.loads((RESULTS / "gpu-binaries.json").read_text())["rows"]
    keys = ("kernel", "x", "adapter", "block", "drop", "rows", "add")
    return {tuple(row[key] for key in keys): row for row in rows if row["target"] == TARGET}


class Adapter:
    """The launches of one adapter, as :mod:`weightlora.ops.triton_path` makes them."""

    def __init__(
        self, known: dict[Key, dict[str, Any]], x: torch.dtype, adapter: torch.dtype, rank: int, p: float
    ) -> None:
        self.known, self.x, self.adapter, self.rank, self.p = known, x, adapter, rank, p
        self.block = next(block for block in triton_path.RANKS if rank <= block)
        self.mixed = x != adapter

    def forward(self, tokens: int, d_in: int, d_out: int) -> list[Launch]:
        """Down, and up into the base's output; the gate on B."""
        x, out = tokens * d_in * self.x.itemsize, tokens * d_out * self.x.itemsize
        h = tokens * self.rank * self.adapter.itemsize
        flops = 2 * tokens * self.rank
        drop = self.p > 0.0
        down = (
            self._down("down", tokens, d_in, drop, True)
            if self.mixed or drop
            else [self._torch("down", x + h, flops * d_in)]
        )
        if self.mixed:
            up = [self._kernel("up", self._variant("_up", False, rows=False, add=True), tokens, d_out, 2 * out + h)]
        else:
            up = [self._torch("up", 2 * out + h, flops * d_out)]
        return [*down, self._small(d_out), *up]

    def backward(self, tokens: int, d_in: int, d_out: int, *, reaches_x: bool) -> list[Launch]:
        """The gradients of B, gate, A and x, and autograd's sum with the base's gradient of x."""
        drop, flops = self.p > 0.0, 2 * tokens * self.rank
        x, g = tokens * d_in * self.x.itemsize, tokens * d_out * self.x.itemsize
        if self.mixed:
            of_g = [*self._outer("of B", tokens, d_out, False), *self._down("of h", tokens, d_out, False, False)]
        else:
            of_g = [self._torch("of B", g, flops * d_out), self._torch("of h", g, flops * d_out)]
        found = [*of_g, self._small(d_out), self._small(tokens), self._small(tokens)]
        if not (self.mixed or drop):
            found.append(self._torch("of A", x, flops * d_in))
            found += [self._torch("of x", x, flops * d_in)] if reaches_x else []
        elif reaches_x and self.block == triton_path.RANKS[0]:
            found += self._split("_back", "of A and x", tokens, d_in, drop, 2 * x)
        else:
            found += self._outer("of A", tokens, d_in, drop)
            found += [self._kernel("of x", self._variant("_up", drop), tokens, d_in, x)] if reaches_x else []
        return found + ([Launch(name="sum of x", bytes=3 * x, dtype=self.x)] if reaches_x else [])

    def _down(self, name: str, tokens: int, width: int, drop: bool, rows: bool) -> list[Launch]:
        block_tokens, block_width = triton_path.tile("_down", self.block)
        blocks = math.ceil(tokens / block_tokens)
        _, slices = triton_path._split_into(math.ceil(width / block_width), blocks)
        h = slices * tokens * self.rank * 4
        read = tokens * width * self.x.itemsize
        variant = self._variant("_down", drop, rows=rows)
        one = self._kernel(name, variant, tokens, width, read + h, blocks * slices)
        return [one, Launch(name="sum of slices", bytes=h, dtype=torch.float32)]

    def _outer(self, name: str, tokens: int, width: int, drop: bool) -> list[Launch]:
        return self._split("_outer", name, tokens, width, drop, tokens * width * self.x.itemsize)

    def _split(self, kernel: str, name: str, tokens: int, width: int, drop: bool, moved: float) -> list[Launch]:
        """A kernel whose programs take slices of the tokens."""
        block_tokens, block_width = triton_path.tile(kernel, self.block)
        blocks = math.ceil(width / block_width)
        _, slices = triton_path._split_into(math.ceil(tokens / block_tokens), blocks)
        parts = slices * self.rank * width * 4
        one = self._kernel(name, self._variant(kernel, drop), tokens, width, moved + parts, blocks * slices)
        return [one, Launch(name="sum of slices", bytes=parts, dtype=torch.float32)]

    def _variant(self, kernel: str, drop: bool, *, rows: bool = True, add: bool = False) -> Key:
        dtypes = (str(self.x).removeprefix("torch."), str(self.adapter).removeprefix("torch."))
        return (kernel, *dtypes, self.block, drop, rows, add)

    def _kernel(
        self, name: str, variant: Key, tokens: int, width: int, moved: float, programs: int | None = None
    ) -> Launch:
        kernel, binary = variant[0], self.known[variant]
        block_tokens, block_width = triton_path.tile(kernel, self.block)
        registers = math.ceil(binary["registers"] / 8) * 8 * 32 * WARPS
        resident = min(H200.registers // registers, H200.shared // (binary["shared_bytes"] + 1024), H200.warps // WARPS)
        tile = block_tokens * block_width * self.x.itemsize
        # One pass of bfloat16, three where float32 meets it; float32 with float32 takes three of TF32, half as fast.
        passes = 1 if self.adapter.itemsize == 2 else 3 if self.x == torch.bfloat16 else 6
        products = passes * (2 if kernel == "_back" else 1)
        tiles = math.ceil(tokens / block_tokens) * math.ceil(width / block_width)
        return Launch(
            name=name,
            bytes=moved,
            flops=2 * tokens * self.block * width * products,
            instructions=tokens * width * binary["instructions_per_entry"],
            programs=programs or tiles,
            resident=resident,
            flight=tile * (1 if kernel == "_up" else 2),  # two stages are on their way while the third is used
        )

    def _torch(self, name: str, moved: float, flops: float) -> Launch:
        return Launch(name=f"{name} (torch)", bytes=moved, flops=flops, dtype=self.x)

    def _small(self, rows: int) -> Launch:
        """Something elementwise on (rows, r)."""
        return Launch(name="small", bytes=2 * rows * self.rank * self.adapter.itemsize, dtype=self.adapter)


def layers_of(model: nn.Module, shape: Shape) -> list[nn.Linear]:
    """What is adapted, in module order."""
    found = get_peft_model(model, LoraConfig(r=1, target_modules=rf".*\.(?:{'|'.join(shape.targets)})"))
    layers = [m.get_base_layer() for m in found.modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")]
    found.unload()
    return layers


@contextlib.contextmanager
def differentiated(modules: Sequence[nn.Module], calls: dict[nn.Module, list[tuple[int, bool]]]) -> Iterator[None]:
    """Outputs of these modules need a gradient, as adapters make them; notes the tokens of every call."""

    def after(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        calls[module].append((given[0].numel() // given[0].shape[-1], given[0].requires_grad))
        return out if out.requires_grad else out.requires_grad_()

    hooks = [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(shape: Shape, adapter_dtype: str, p: float, rank: int, device: Device) -> dict[str, dict[str, Any]]:
    """Every row's totals, and of ours what each kernel of an adapter takes."""
    model, _ = build(shape, "meta", 0)
    ids = torch.full((shape.batch, shape.length), 5)
    labels = torch.zeros(shape.batch, dtype=torch.long) if shape.model.endswith("Classification") else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    layers = layers_of(model, shape)

    def loss() -> Tensor:
        found: Tensor = model(**batch).loss
        return found

    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    with differentiated(tables, defaultdict(list)):
        bare = counted(model, loss)
    rows = {"bare": total(bare, device)}
    one = Adapter(binaries(), shape.dtype, torch.float32 if adapter_dtype == "float32" else shape.dtype, rank, p)
    deepest = layers[-min(shape.k_deepest, len(layers)) :]
    spread = layers[:: max(1, len(layers) // shape.k_random)][: shape.k_random]
    for name, live in (
        ("ours", layers),
        (f"ours-spread-{len(spread)}", spread),
        (f"ours-deepest-{len(deepest)}", deepest),
    ):
        calls: dict[nn.Module, list[tuple[int, bool]]] = defaultdict(list)
        with differentiated(live, calls):
            free = counted(model, loss)
        own: list[Launch] = []
        for layer in live:
            for tokens, reaches_x in calls[layer]:
                own += one.forward(tokens, layer.in_features, layer.out_features)
                own += one.backward(tokens, layer.in_features, layer.out_features, reaches_x=reaches_x)
        rows[name] = {
            **total([*free, *own], device),
            "adapters": total(own, device),
            "by_kernel": by_kernel(own, device),
        }
    config = LoraConfig(r=rank, lora_dropout=p, target_modules=rf".*\.(?:{'|'.join(shape.targets)})")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == "float32").train()
    rows["stock"] = total(counted(adapted, lambda: adapted(**batch).loss), device)
    for row in rows.values():
        row["times_bare"] = row["seconds"] / rows["bare"]["seconds"]
        row["times_faster_than_stock"] = rows["stock"]["seconds"] / row["seconds"]
    return rows


def by_kernel(launches: Sequence[Launch], device: Device) -> dict[str, dict[str, Any]]:
    """Of launches with the same name: seconds, bytes, what limits most of them, and the least share of memory's speed
    that their grids ask for."""
    found: dict[str, dict[str, Any]] = {}
    for one in launches:
        row = found.setdefault(one.name, {"launches": 0, "seconds": 0.0, "bytes": 0.0, "asked": 1.0, "limits": {}})
        row["launches"] += 1
        row["seconds"] += one.seconds(device)
        row["bytes"] += one.bytes
        row["asked"] = min(row["asked"], one.asked(device), one.filled(device))
        limit = one.limit(device)
        row["limits"][limit] = row["limits"].get(limit, 0) + 1
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), nargs="+", help="of the cases; default: all")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu-model.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    cases = []
    for name, batch, adapter_dtype, p in CASES:
        if args.shape and name not in args.shape:
            continue
        shape = resized(SHAPES[name], {}, layers=args.layers, batch=batch, length=None)
        rows = rows_of(shape, adapter_dtype, p, args.rank, H200)
        cases.append({
            "shape": name, "batch": batch, "length": shape.length, "adapter_dtype": adapter_dtype, "dropout": p,
            "rank": args.rank, "layers": args.layers, "rows": rows,
        })  # fmt: skip
        print(f"{name}, {batch} x {shape.length}, adapters in {adapter_dtype}, dropout {p}")
        for row, found in rows.items():
            line = f"  {row:20} {found['seconds'] * 1e3:8.2f} ms {found['kernels']:6} kernels"
            line += f"  {found['times_bare']:5.3f} x bare"
            print(f"{line}  {found['times_faster_than_stock']:5.2f} x as fast as stock", flush=True)
    known = json.loads((RESULTS / "gpu-binaries.json").read_text())
    device = {**vars(H200), "rates": {str(key): value for key, value in H200.rates.items()}}
    result = {"benchmark": "gpu_model", "device": device, "torch": torch.__version__,
              "kernels_sha256": known["kernels_sha256"], "cases": cases}  # fmt: skip
    write(args.out, result)
    return result


if __name__ == "__main__":
    main()

"""Every gradient of both lean engines against the formula in float64, on a device; whether CUDA graphs hold a step.

    python benchmarks/gpu_check.py --device cuda
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu

Relative errors per dtype pair, dropout and tensor; the mask is read off the engine itself. On CUDA also: a step that
never waits for the host, and a captured step whose replays draw new masks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_path import provenance, write
from weightlora.ops import AdapterPath, engine, why_no_triton

PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
# What rounding allows: of the output's and the factors' dtypes, with room for the order of sums.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
SCALE, GATE = 2.0, 0.7


def inputs(base: torch.dtype, adapter: torch.dtype, args: argparse.Namespace) -> list[Tensor]:
    """x, result, A, B, gate."""
    generator = torch.Generator().manual_seed(args.seed)
    shapes = [
        (args.tokens, args.width),
        (args.tokens, args.out_width),
        (args.rank, args.width),
        (args.out_width, args.rank),
    ]
    dtypes = (base, base, adapter, adapter)
    made = [torch.randn(s, generator=generator).to(args.device, d) for s, d in zip(shapes, dtypes, strict=True)]
    return [t.requires_grad_() for t in (*made, torch.tensor(GATE, device=args.device))]


def mask(path: AdapterPath, base: torch.dtype, p: float, args: argparse.Namespace) -> Tensor:
    """What is kept of x under the current seed, over its probability: ones through an identity."""
    if p == 0.0:
        return torch.ones(args.tokens, args.width, dtype=torch.float64, device=args.device)
    kept = []
    state = torch.get_rng_state()
    for first in range(0, args.width, args.rank):
        torch.set_rng_state(state)
        A = torch.zeros(args.rank, args.width, device=args.device, dtype=torch.float32)
        for row in range(min(args.rank, args.width - first)):
            A[row, first + row] = 1.0
        x = torch.ones(args.tokens, args.width, device=args.device, dtype=base)
        zero = torch.zeros(args.tokens, args.rank, device=args.device, dtype=base)
        eye = torch.eye(args.rank, device=args.device, dtype=torch.float32)
        kept.append((path(x, zero, A, eye, None, 1.0, p) > 0.5)[:, : args.width - first])
    torch.set_rng_state(state)
    return torch.cat(kept, 1).double() / (1.0 - p)


def errors(name: str, base: torch.dtype, adapter: torch.dtype, p: float, args: argparse.Namespace) -> dict[str, float]:
    """Relative distance of the output and of every gradient to the formula."""
    path, tensors = engine(name), inputs(base, adapter, args)  # type: ignore[arg-type]
    torch.manual_seed(args.seed)
    kept = mask(path, base, p, args)
    torch.manual_seed(args.seed)
    out = path(*tensors, SCALE, p)  # type: ignore[arg-type]
    g = torch.sin(torch.arange(1.0, out.numel() + 1, device=args.device)).reshape(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, tensors, g)
    x, result, A, B, gate = (t.detach().double() for t in tensors)
    g, dropped = g.double(), x * kept
    dense, update = g.T @ dropped, B @ A
    want = {
        "out": result + SCALE * gate * dropped @ update.T,
        "x": SCALE * gate * (g @ update) * kept,
        "result": g,
        "A": SCALE * gate * B.T @ dense,
        "B": SCALE * gate * dense @ A.T,
        "gate": SCALE * (dense * update).sum(),
    }
    got = {key: found.detach().double() for key, found in zip(want, (out, *grads), strict=True)}
    return {key: float((got[key] - value).norm() / value.norm()) for key, value in want.items()}


def captured(args: argparse.Namespace) -> dict[str, bool]:
    """A whole step inside a CUDA graph: replays agree without dropout and draw anew with it."""
    found = {}
    for p in (0.0, 0.3):
        tensors = inputs(torch.bfloat16, torch.float32, args)
        path = engine("triton")

        def step(tensors: list[Tensor] = tensors, p: float = p, path: AdapterPath = path) -> Tensor:
            out = path(*tensors, SCALE, p)  # type: ignore[arg-type]
            return torch.autograd.grad(out.float().square().sum(), tensors)[2]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, as a capture must not
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grad = step()
        graph.replay()
        first = grad.clone()
        graph.replay()
        found[f"replays {'draw anew' if p else 'agree'}"] = bool(torch.equal(first, grad)) == (p == 0.0)
    return found


def waits(args: argparse.Namespace) -> bool:
    """Whether a compiled step ever waits for the host."""
    tensors = inputs(torch.bfloat16, torch.float32, args)
    for strict in (False, True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            out = engine("auto")(*tensors, SCALE, 0.1)  # type: ignore[arg-type]
            torch.autograd.grad(out.float().square().sum(), tensors)
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=777)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--out-width", type=int, default=520)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    rows = []
    for name, (base, adapter), p in itertools.product(("autograd", "triton"), PAIRS, (0.0, 0.3)):
        if name == "triton" and why_no_triton() is not None:
            continue
        found = errors(name, base, adapter, p, args)
        wide = max(base.itemsize, adapter.itemsize) == 4
        bounds = {
            key: BOUND[torch.float32 if wide and (base == adapter or key in ("A", "B", "gate")) else torch.bfloat16]
            for key in found
        }
        good = all(found[key] <= bounds[key] for key in found)
        rows.append(
            {"engine": name, "base": str(base), "adapter": str(adapter), "dropout": p, "errors": found, "good": good}
        )
        print(name, base, adapter, p, "good" if good else f"WRONG: {found}", flush=True)
    result: dict[str, Any] = {"benchmark": "gpu_check", "rows": rows, "provenance": provenance(args)}
    if args.device.startswith("cuda"):
        result |= {"waits_for_the_host": waits(args), "graphs": captured(args) if why_no_triton() is None else {}}
        print(f"waits for the host: {result['waits_for_the_host']}; graphs: {result['graphs']}")
    write(args.out, result)
    good = all(row["good"] for row in rows) and not result.get("waits_for_the_host")
    if not (good and all(result.get("graphs", {}).values())):
        raise SystemExit("the adapter path is wrong on this device; the file has the errors")
    return result


if __name__ == "__main__":
    main()

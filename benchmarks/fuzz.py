"""Throws broken input at everything that reads some, in this process, and counts what is not a clear refusal.

    python benchmarks/fuzz.py --count 100000 --seed 0 --json fuzz.json

Kinds: command lines, recipes, manifests, records, selections, run configurations, data files, runs for the report. Each
input starts from a good one and is broken a few times: other types, extreme numbers, missing and unknown keys, cut and
garbled bytes, names with markup and path separators. A finding is an exception that is not `WeightLoRAError` (a
traceback on somebody's screen), more than one line of error, markup that a page shows unescaped, or a file that is
made, changed or removed anywhere outside the folder that the call was given (an audit hook watches the calls that can).
Command lines take longest; they are one input in twenty.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

NAMES = [
    "",
    "../../outside",
    "/etc/passwd",
    "a\nb",
    "<script>x</script>",
    "|x|`y`",
    "=1+1",
    "\u0000",
    "é\ud83d",
    "x" * 5000,
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    [], {}, [[]], {"a": None}, [1, 2, 3], *NAMES,
]  # fmt: skip


CHANGES = frozenset(("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink"))
# Of libraries, on import.
IGNORED = ("/dev/", "/proc/", os.path.join(tempfile.gettempdir(), "torchinductor"), matplotlib.get_configdir(),
           matplotlib.get_cachedir())  # fmt: skip
RELATIVE = frozenset(("os.remove", "os.rmdir"))
DRY = [
    ["train", "--dry-run"],
    ["compare", "--dry-run", "--methods", "lora,weightlora"],
    ["sweep", "--dry-run", "--methods", "lora,weightlora:paper"],
    ["reproduce", "table1", "--dry-run", "--scale", "small"],
    ["resume", "nowhere"],
    ["export", "nowhere"],
    ["report", "nowhere"],
]


class Fuzz:
    """Inputs of every kind, from one seed.

    Args:
        seed: same seed, same inputs.
        folder: everything is written below ``folder/work``; ``folder`` itself is watched.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir()
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.findings: list[dict[str, str]] = []
        self.outside: list[str] = []
        self.guarding = False
        sys.addaudithook(self.watch)
        self.kinds: dict[str, Callable[[], Any]] = {
            "arguments": self.arguments,
            "recipe": self.recipe,
            "manifest": self.manifest,
            "record": self.record,
            "selection": self.selection,
            "config": self.config,
            "data": self.data,
            "report": self.report,
        }

    def run(self, count: int) -> dict[str, Any]:
        """Throw `count` inputs, each kind in turn; what came of them."""
        began = time.perf_counter()
        names = [name for name in self.kinds if name != "arguments"]
        for number in range(count):
            self.one("arguments" if number % 20 == 0 else names[number % len(names)], number)
        return {
            "inputs": dict(self.counts),
            "outcomes": dict(self.outcomes),
            "findings": self.findings,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def one(self, kind: str, number: int) -> None:
        """One input of one kind, judged."""
        from weightlora.errors import WeightLoRAError

        self.counts[kind] += 1
        shutil.rmtree(self.work)
        self.work.mkdir()
        out, err = io.StringIO(), io.StringIO()
        outcome = "accepted"
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), self.guard():
                self.kinds[kind]()
        except WeightLoRAError as error:
            outcome = "refused"
            if "\n" in str(error):
                self.find(kind, number, f"more than one line: {error}")
        except SystemExit as stop:
            outcome = f"exit {stop.code}"
        except Exception:  # the very thing that is looked for
            outcome = "traceback"
            self.find(kind, number, traceback.format_exc())
        if "Traceback" in err.getvalue():
            self.find(kind, number, err.getvalue())
        if self.outside:
            self.find(kind, number, f"wrote outside: {self.outside}")
            self.outside.clear()
        self.outcomes[f"{kind}: {outcome}"] += 1

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """A hook cannot be taken off again; here it looks."""
        self.guarding = True
        try:
            yield
        finally:
            self.guarding = False

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        """Note what is about to change a file elsewhere, and forbid it."""
        if not self.guarding or event not in CHANGES or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if event in RELATIVE and args[-1] >= 0:
            return  # below a folder that is open: a tree on its way out, whose root was seen
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith((str(self.folder), *IGNORED)):
            self.outside.append(f"{event} {path}")
            raise PermissionError(f"{path}: not in a fuzz run")

    def find(self, kind: str, number: int, what: str) -> None:
        """Note a finding; the first two hundred are kept."""
        if len(self.findings) < 200:
            self.findings.append({"kind": kind, "number": str(number), "what": what[-1500:]})

    # how things are broken

    def broken(self, data: Any) -> Any:
        """A copy of plain data with one to three things in it changed."""
        whole = json.loads(json.dumps(data))
        for _ in range(self.random.randint(1, 3)):
            places = list(_places(whole))
            if not places:
                return self.value()
            holder, key = self.random.choice(places)
            action = self.random.randrange(4)
            if action == 0 and isinstance(holder, dict):
                del holder[key]
            elif action == 1 and isinstance(holder, dict):
                holder[self.random.choice(NAMES)] = self.value()
            elif action == 2 and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            else:
                holder[key] = self.value()
        return whole

    def value(self) -> Any:
        """Something of any type."""
        return copy.deepcopy(self.random.choice(VALUES))

    def text(self, data: Any) -> bytes:
        """Broken data as JSON, sometimes with broken bytes, too."""
        raw = json.dumps(self.broken(data)).encode("utf-8", "surrogatepass")
        action = self.random.randrange(8)
        if action == 0:
            raw = raw[: self.random.randrange(len(raw) + 1)]
        elif action == 1 and raw:
            cut = self.random.randrange(len(raw))
            raw = raw[:cut] + self.random.randbytes(3) + raw[cut + 1 :]
        elif action == 2 and self.random.random() < 0.1:
            raw = b"[" * 20_000
        return raw

    # the kinds

    def words(self) -> list[str]:
        """A command line around a dry run: no weights, no data, and nothing to train."""
        from weightlora.cli.flags import METHOD_HELP
        from weightlora.runs.spec import RunSpec

        names = [name for name in (*RunSpec().values(), *METHOD_HELP) if name not in ("settings", "training")]
        flags = ["--" + name.replace("_", "-") for name in names]
        flags += ["--max-steps", "--learning-rate", "--method", "--preset", "--nonsense", "--out", "--json", "--bf16"]
        words = self.random.choice(DRY)[:]
        for _ in range(self.random.randint(0, 5)):
            words.append(self.random.choice(flags))
            if self.random.random() < 0.9:
                words.append(str(self.random.choice([*VALUES, "sst2", "lora", "weightlora+", "minilm", "0.25", "7"])))
        # A name of the fuzzer's would be the user's own wish to write there.
        return [str(self.work / "out.json") if before == "--json" else word for before, word in pairwise(["", *words])]

    def arguments(self) -> None:
        from weightlora.cli.main import main

        code = main(self.words())
        if code:
            raise SystemExit(code)

    def recipe(self) -> None:
        from weightlora.runs.recipe import read_recipe

        good = {
            "task": "sst2",
            "method": "weightlora",
            "k": 9,
            "seeds": [0, 1],
            "bf16": True,
            "tasks": [{"task": "cola"}],
        }
        path = self.work / "recipe.yaml"
        path.write_bytes(self.text(good))
        read_recipe(path)

    def manifest(self) -> None:
        from weightlora.graft.manifest import MANIFEST, Manifest
        from weightlora.training.global_batch import GlobalBatch
        from weightlora.training.results import read_progress

        good = self.good_manifest()
        good.write(self.work, {})
        (self.work / MANIFEST).write_bytes(self.text(json.loads(good.to_json())))
        if self.random.random() < 0.2:
            (self.work / "weightlora.safetensors").write_bytes(self.random.randbytes(self.random.randrange(40)))
        found, _ = Manifest.read(self.work)
        read_progress(found.data, self.work)
        GlobalBatch.read(found.data, self.work)

    def record(self) -> None:
        from weightlora.runs.record import Record

        (self.work / "record.json").write_bytes(self.text(self.good_record()))
        Record.read(self.work / "record.json").to_json()

    def selection(self) -> None:
        from weightlora.graft.selection import Selection

        selection = self.good_manifest().selection
        assert selection is not None
        (self.work / "selection.json").write_bytes(self.text(selection.to_dict()))
        found = Selection.load(self.work / "selection.json")
        found.lora_config()
        assert found.groups is not None

    def config(self) -> None:
        from weightlora.runs.spec import RunSpec

        good = RunSpec.of({"task": "sst2", "k": 3, "max_steps": 3}).to_dict()
        (self.work / "config.json").write_bytes(self.text(good))
        RunSpec.load(self.work)

    def data(self) -> None:
        from weightlora.tasks import load_task

        rows = [{"text": f"row {number}", "label": number % 2} for number in range(6)]
        path = self.work / self.random.choice(["rows.jsonl", "rows.csv"])
        if path.suffix == ".csv":
            lines = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
            raw = bytearray(lines.encode())
            for _ in range(self.random.randint(0, 4)):
                at = self.random.randrange(len(raw))
                raw[at : at + 1] = self.random.choice([b",", b'"', b"\n", b"\x00", b"\xff", b"", b"=1+1"])
            path.write_bytes(bytes(raw))
        else:
            path.write_bytes(b"\n".join(self.text(row) if self.random.random() < 0.4 else json.dumps(row).encode()
                                        for row in rows))  # fmt: skip
        load_task("files", train_file=path)

    def report(self) -> None:
        """Manifest, trainer state and record of a run, one of them broken, in the one page."""
        from weightlora.report.page import report
        from weightlora.report.runfiles import find_runs

        run = self.work / "run"
        checkpoint = run / "checkpoints" / "checkpoint-3"
        checkpoint.mkdir(parents=True)
        files = {
            run / "record.json": self.good_record(),
            checkpoint / "weightlora.json": json.loads(self.good_manifest().to_json()),
            checkpoint / "trainer_state.json": {
                "global_step": 3, "log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}],
            },
        }  # fmt: skip
        bad = self.random.choice(list(files))
        for path, content in files.items():
            path.write_bytes(self.text(content) if path == bad else json.dumps(content).encode())
        for found in find_runs([run]).runs:
            found.read_log()
        if self.random.random() < 0.2:  # drawing takes a while
            made = report([run])
            assert "<script>x" not in made.html
            json.loads(made.json)

    # good ones

    def good_manifest(self) -> Any:
        """A manifest after the seam."""
        from weightlora.graft.manifest import Manifest
        from weightlora.graft.selection import Choice, Selection

        choices = tuple(
            Choice(name=name, kept=kept, omega=1.0, score=0.5, rank=4, scale=2.0)
            for name, kept in (("layer.0.query", True), ("layer.1.query", False), ("layer.1.value", True))
        )
        selection = Selection(method="weightlora", preset="paper", step=3, why="largest", choices=choices)
        phase = {"name": "warmup", "steps": 3, "seconds": 1.0, "micro_batch": 4, "accumulation": 1,
                 "trainable_params": 9,
                 "kept_activation_bytes": None, "flops_per_step": None, "peak_memory_bytes": None}  # fmt: skip
        return Manifest(
            stage="final", step=3, adapter="default", adapters=tuple((c.name, 8, 8, 4) for c in choices),
            method={"name": "weightlora"}, selection=selection, base="ab",
            data={"seconds": 1.0, "phases": [phase],
                  "batch": {"processes": 2, "examples": 8, "parts": 1, "averaged": True}},
        )  # fmt: skip

    def good_record(self) -> dict[str, Any]:
        """A record of a run that is going on."""
        return {
            "schema_version": 1, "status": "running", "method": "weightlora", "preset": "paper", "task": "sst2",
            "model": "minilm", "seed": 0, "k": 2, "r": 4, "n_adapters": 3, "adapters": [], "metrics": {"accuracy": 0.5},
            "kept": [{"name": "layer.0.query", "omega": 1.0, "rank": 4}], "trainable_params": {"warmup": 5},
            "metric": "accuracy", "phases": [], "seam_step": 3, "max_steps": 9, "why": "x", "versions": {"python": "3"},
            "argv": ["weightlora"], "config": {}, "error": None, "machine": {"cores": 2},
        }  # fmt: skip


def _places(data: Any) -> Any:
    """Every (container, key) in plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Fuzz(parsed.seed, Path(folder)).run(parsed.count)
    text = json.dumps({"seed": parsed.seed, "count": parsed.count, **result}, indent=1)
    if parsed.json:
        Path(parsed.json).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())

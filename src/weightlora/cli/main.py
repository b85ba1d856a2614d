"""The command line: arguments in, exit code out. 0 success, 1 a run failed, 2 a mistake in what was asked."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weightlora import __version__
from weightlora.cli import arguments
from weightlora.errors import WeightLoRAError

Command = Callable[[argparse.Namespace, list[str], argparse.ArgumentParser], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    words = arguments.dashed(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    if not words:
        parser.print_help()
        return 2
    command = words[0]
    try:
        takes_rest = command in commands and commands[command][2]
        if takes_rest and len(words) > 1 and not words[1].startswith("-"):
            words = [command, *arguments.read_recipe(words[1]), *words[2:]]
        parsed, rest = parser.parse_known_args(words)
        sub, run, _ = commands[parsed.command]
        if rest and not takes_rest:
            sub.error(f"unrecognized arguments: {' '.join(rest)}")
        _quiet_libraries()
        return run(parsed, rest, sub)
    except WeightLoRAError as error:
        print(f"weightlora {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = next((b for a, b in zip(words, words[1:], strict=False) if a == "--out"), "DIR")
        print(f"\ninterrupted; `weightlora resume {where}` goes on from the last checkpoint", file=sys.stderr)
        return 130


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[argparse.ArgumentParser, Command, bool]]]:
    """The parser, and for each command its own parser, its function, and whether it takes trainer flags."""
    parser = argparse.ArgumentParser(
        prog="weightlora", allow_abbrev=False, description="Keep only the LoRA adapters a task needs.",
        epilog="weightlora COMMAND --help tells more. Exit codes: 0 success, 1 a run failed, 2 a mistake in what was asked.",
    )
    parser.add_argument("--version", action="version", version=f"weightlora {__version__}")
    subs = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, tuple[argparse.ArgumentParser, Command, bool]] = {}

    def add(name: str, run: Command, text: str, usage: str, example: str, *, takes_rest: bool = False) -> argparse.ArgumentParser:
        sub = subs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example:\n  {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            usage=f"weightlora {name} {usage}",
        )
        commands[name] = sub, run, takes_rest
        return sub

    def out(sub: argparse.ArgumentParser, default: str | None, overwrite: bool = True) -> None:
        sub.add_argument("--out", metavar="DIR", default=default, help=f"where everything goes (default: {default})")
        if overwrite:
            sub.add_argument("--overwrite", action="store_true", help="replace what is in --out")
        sub.add_argument("--json", metavar="FILE", help="write the result for a machine, too (- for standard output)")

    names = "a method: weightlora, weightlora+, lora, full, random, top, gradient"
    sub = add(
        "train", _train, "train one model with one method", "[RECIPE.yaml] [FLAGS]", takes_rest=True,
        example="weightlora train --task sst2 --data-dir DATA --method weightlora --k 9 --max-steps 200 --out runs/sst2",
    )
    sub.add_argument("--method", default=argparse.SUPPRESS, help=f"{names} (default: weightlora)")
    arguments.add_run_flags(sub)
    out(sub, "runs/train")
    sub = add("resume", _resume, "go on with an interrupted run", "RUN [--json FILE]", example="weightlora resume runs/sst2")
    sub.add_argument("run", metavar="RUN", help="a run directory")
    sub.add_argument("--json", metavar="FILE", help="write the record for a machine, too (- for standard output)")
    sub = add(
        "select", _select, "choose adapters only: selection.json and a LoraConfig for any trainer", "[RECIPE.yaml] [FLAGS]",
        takes_rest=True,
        example="weightlora select --task sst2 --data-dir DATA --k 9 --max-steps 400 --out chosen",
    )
    sub.add_argument("--method", default=argparse.SUPPRESS, help=f"{names} (default: weightlora)")
    arguments.add_run_flags(sub)
    out(sub, "runs/select")
    sub = add(
        "compare", _compare, "run methods against each other, over seeds, in one table", "[RECIPE.yaml] [FLAGS]",
        takes_rest=True,
        example="weightlora compare --methods weightlora,random,lora --seeds 0,1,2 --task sst2 --data-dir DATA --k 9",
    )
    sub.add_argument("--methods", default=argparse.SUPPRESS, help="comma-separated, each NAME or NAME:PRESET; or all (default)")
    sub.add_argument("--seeds", default=argparse.SUPPRESS, help="comma-separated (default: 0,1,2)")
    sub.add_argument("--tune", default=argparse.SUPPRESS, metavar="LR,LR,...",
                     help="choose each method's learning rate from these on a held-out tenth of the training rows")
    arguments.add_run_flags(sub)
    out(sub, "runs/compare", overwrite=False)
    sub = add(
        "export", _export, "write a run's adapter for a server, or merged into its base",
        "RUN [--profile PROFILE] [--out DIR]",
        example="weightlora export runs/sst2 --profile portable --out served",
    )
    sub.add_argument("run", metavar="RUN", help="a finished run directory")
    sub.add_argument("--profile", default="native", choices=("native", "portable", "dense", "merged"),
                     help="native: stock PEFT; portable: vLLM, SGLang, llama.cpp; dense: the same on every layer; merged: no adapter")
    out(sub, None)
    return parser, commands


def _quiet_libraries() -> None:
    """Progress is ours; libraries speak when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("weightlora").setLevel(logging.INFO)
    # PEFT asks Transformers by a name that is about to change; no user can do anything about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _write_json(target: str | None, text: str) -> None:
    if target == "-":
        print(text)
    elif target is not None:
        from weightlora.files import write_text

        write_text(Path(target), text if text.endswith("\n") else text + "\n")


def _report(record: Any, folder: Path, target: str | None) -> int:
    """Print what a run came to; 1 if it failed."""
    from weightlora.runs.run import ADAPTER, ERROR, MODEL

    _write_json(target, record.to_json())
    if record.status != "ok":
        print(f"weightlora: the run failed: {record.error} (see {folder / ERROR})", file=sys.stderr)
        return 1
    from weightlora.report import run_summary

    if target != "-":
        print(run_summary(record))
        what, where = ("adapter", ADAPTER) if record.n_adapters else ("model", MODEL)
        print(f"{what}: {folder / where}")
    return 0


def _train(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs.run import train

    config = arguments.run_config(parsed, rest, parser, getattr(parsed, "method", "weightlora"))
    record = train(config, Path(parsed.out), overwrite=parsed.overwrite, argv=_argv())
    return _report(record, Path(parsed.out), parsed.json)


def _resume(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs.run import resume

    return _report(resume(Path(parsed.run), argv=_argv()), Path(parsed.run), parsed.json)


def _select(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs.run import SELECTION, select

    config = arguments.run_config(parsed, rest, parser, getattr(parsed, "method", "weightlora"))
    selection = select(config, Path(parsed.out), overwrite=parsed.overwrite)
    _write_json(parsed.json, selection.to_json())
    if parsed.json != "-":
        print(f"kept {selection.k} of {selection.n} adapters: {selection.why}")
        print(*(f"  {choice.name}" for choice in selection.kept), sep="\n")
        print(f"selection: {Path(parsed.out) / SELECTION}\nLoraConfig: {Path(parsed.out) / 'adapter_config.json'}")
    return 0


def _compare(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.files import write_text
    from weightlora.methods import METHODS
    from weightlora.report import comparison_table
    from weightlora.runs.compare import compare

    asked = getattr(parsed, "methods", "all")
    methods = list(METHODS) if asked == "all" else [name.strip() for name in asked.split(",")]
    seeds = [arguments.whole(text, "seeds") for text in getattr(parsed, "seeds", "0,1,2").split(",")]
    rates = [float(arguments.number(text, "tune")) for text in getattr(parsed, "tune", "").split(",") if text]
    folder = Path(parsed.out)
    config = arguments.run_config(parsed, rest, parser, "")
    records = compare(config, methods, seeds, folder, tune=rates, say=lambda line: print(line, file=sys.stderr, flush=True))
    table = comparison_table(records)
    write_text(folder / "compare.md", table.to_markdown())
    write_text(folder / "compare.json", table.to_json())
    _write_json(parsed.json, table.to_json())
    if parsed.json != "-":
        print(table.to_text())
    return 0 if all(record.status == "ok" for record in records) else 1


def _export(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs.serve import export_run

    out = Path(parsed.out) if parsed.out else Path(parsed.run) / parsed.profile
    done = export_run(Path(parsed.run), out, parsed.profile, overwrite=parsed.overwrite)
    facts = {"path": str(done.path), "profile": done.profile, "max_difference": done.max_difference,
             "tolerance": done.tolerance, "rank": done.rank, "notes": list(done.notes)}
    _write_json(parsed.json, json.dumps(facts, indent=1))
    if parsed.json != "-":
        print(f"{done.profile} export: {done.path}")
        print(f"reloaded and compared: largest logit difference {done.max_difference:.2g} (allowed {done.tolerance:.2g})")
        print(*done.notes, sep="\n")
    return 0


def _argv() -> tuple[str, ...]:
    return ("weightlora", *sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())

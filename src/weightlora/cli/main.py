"""The command line: arguments in, exit code out. 0 success, 1 a run failed, 2 a mistake in what was asked."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from weightlora import __version__
from weightlora.cli import arguments, commands, grids, sweeping
from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.files import disk_is_full
from weightlora.runs.record import EVAL_LOSS

Command = Callable[[argparse.Namespace, list[str], argparse.ArgumentParser], int]

# name: (function, takes the flags of a run, what it does, usage, example)
COMMANDS: dict[str, tuple[Command, bool, str, str, str]] = {
    "train": (
        commands.train, True, "train one model with one method", "[RECIPE.yaml] [FLAGS]",
        "weightlora train --task sst2 --data-dir DATA --method weightlora --k 9 --max-steps 200 --out runs/sst2",
    ),
    "resume": (
        commands.resume, False, "go on with an interrupted run", "RUN [--json FILE]", "weightlora resume runs/sst2",
    ),
    "select": (
        commands.select, True, "choose adapters only: selection.json and a LoraConfig for any trainer",
        "[RECIPE.yaml] [FLAGS]",
        "weightlora select --task sst2 --data-dir DATA --k 9 --max-steps 400 --out chosen",
    ),
    "compare": (
        commands.compare, True, "run methods against each other, over seeds, in one table", "[RECIPE.yaml] [FLAGS]",
        "weightlora compare --methods weightlora,random,lora --seeds 0,1,2 --task sst2 --data-dir DATA --k 9",
    ),
    "sweep": (
        sweeping.sweep, True, "tune and run a grid of tasks and methods over seeds, here or on a Ray cluster",
        "[RECIPE.yaml] [FLAGS]",
        "weightlora sweep --tasks cola,sst2 --methods lora,weightlora --learning-rates 3e-4,1e-3,3e-3 --data-dir DATA",
    ),
    "reproduce": (
        sweeping.reproduce, True, "run an experiment of the paper, and set its numbers beside ours",
        "EXPERIMENT [--scale small] [FLAGS]",
        "weightlora reproduce table1 --task cola --methods lora,weightlora --scale small --data-dir DATA",
    ),
    "probe": (
        commands.probe, True, "the paper's Figure 2: how much each adapter would still change the loss, by layer",
        "[RECIPE.yaml] [FLAGS]",
        "weightlora probe --task sst2 --data-dir DATA --seeds 0,1,2 --k 9 --max-steps 400 --out probe",
    ),
    "memory": (
        commands.memory, True, "the paper's Figure 3: a run's memory against the number of connected adapters",
        "[RECIPE.yaml] [FLAGS]",
        "weightlora memory --task sst2 --data-dir DATA --model deberta-v3-base-shape --limit 16GiB --out memory",
    ),
    "plan": (
        commands.plan, False, "say what a run would take, and what fits into a memory", "[--memory SIZE] [FLAGS]",
        "weightlora plan --model llama-3-8b --length 2048 --memory 40GiB --checkpointing\n"
        "  weightlora plan --model deberta-v3-base --targets attention --r 8 --k 9 --batch 32 --memory 8GiB",
    ),
    "export": (
        commands.export, False, "write a run's adapter for a server, or merged into its base",
        "RUN [--profile PROFILE] [--out DIR]", "weightlora export runs/sst2 --profile portable --out served",
    ),
    "report": (
        commands.report, False, "show runs in one HTML file: what was kept, why, and what it saved",
        "RUN... [--out FILE]", "weightlora report runs/sst2 runs/compare --out report.html",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    # PEFT 0.20 says so of a base that has no name, whenever it is saved.
    warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
    words = arguments.dashed(sys.argv[1:] if argv is None else argv)
    parser, table = build_parser()
    if not words:
        parser.print_help()
        return 2
    command = words[0]
    try:
        takes_rest = command in table and table[command][2]
        recipe, given = [], words[1:]
        if command == "reproduce":  # whose first word is an experiment
            given = words[2:]
        elif takes_rest and given and not given[0].startswith("-"):
            recipe, given = arguments.read_recipe(given[0]), given[1:]
            words = [command, *recipe, *given]
        parsed, rest = parser.parse_known_args(words, argparse.Namespace(recipe=recipe, given=given))
        if parsed.command is None:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        sub, run, _ = table[parsed.command]
        if rest and not takes_rest:
            sub.error(f"unrecognized arguments: {' '.join(rest)}")
        _check_processes(parsed)
        if parsed.json is not None and Path(parsed.json).is_dir():
            raise ConfigError(f"{parsed.json} is a folder; give --json a file, or - for standard output")
        if parsed.command == "report":  # which loads none of them
            return run(parsed, rest, sub)
        # The time of a plan is imports and one trace, where little dies that collecting could find.
        with _collection_paused() if parsed.command == "plan" else contextlib.nullcontext():
            _quiet_libraries()
            return run(parsed, rest, sub)
    except WeightLoRAError as error:
        which = f" (process {_number()})" if _number() else ""
        print(f"weightlora {command}: error: {error}{which}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and not disk_is_full(error):
            raise  # no file of the user's: ours to mend
        print(f"weightlora {command}: error: {_about_file(error)}", file=sys.stderr)
        return 1 if disk_is_full(error) else 2
    except KeyboardInterrupt:
        print("\ninterrupted" + _how_to_go_on(command, parsed), file=sys.stderr)
        return 130


def _check_processes(parsed: argparse.Namespace) -> None:
    """Most commands have nothing to share out among the processes of a launcher, and would all write the same files."""
    from weightlora.runs.together import launched

    if launched() > 1 and (parsed.command not in ("train", "resume") or getattr(parsed, "dry_run", False)):
        raise ConfigError(
            f"{launched()} processes were started, and only train and resume share their work; start"
            f" `weightlora {parsed.command}` in one process, without torchrun or accelerate launch"
        )


def _number() -> int:
    """Of this process among those of its run; 0 for the main one."""
    from weightlora.runs.together import follows

    return follows()


def _about_file(error: OSError) -> str:
    what = f"{error.filename or 'a file'}: {error.strerror}"
    if disk_is_full(error):
        return f"{what}; free some space, then give the same command again, or `weightlora resume` to a run that began"
    return f"{what}; give a path that exists, and that you may read or write as the command needs"


def entry() -> NoReturn:
    """What the program `weightlora` runs: :func:`main`, and the end of the process."""
    status = main()
    if sys.argv[1:2] == ["plan"]:  # which holds nothing open, and whose traced model takes seconds to tear down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _how_to_go_on(command: str, parsed: argparse.Namespace) -> str:
    if command in ("train", "resume"):
        run = parsed.out if command == "train" else parsed.run
        return f"; `weightlora resume {run}` goes on from the last checkpoint"
    again = command in ("compare", "sweep", "reproduce", "probe")
    return "; the same command again goes on where it was" if again else ""


METHOD_HELP = (
    "a method: weightlora, weightlora+, lora, full, head, zero-shot, random, top, gradient, adalora, increlora,"
    " dynamic_lora, lora_drop, alora, flexora, flexlora, melora, tied_lora, nora, milora, dora, vera, vb_lora (default:"
    " weightlora)"
)


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[argparse.ArgumentParser, Command, bool]]]:
    """The parser, and for each command its own parser, its function, and whether it takes the flags of a run."""
    parser = argparse.ArgumentParser(
        prog="weightlora",
        allow_abbrev=False,
        description="Keep only the LoRA adapters a task needs.",
        epilog="weightlora COMMAND --help tells more. Exit codes: 0 success, 1 a run failed, 2 a mistake in the flags.",
    )
    parser.add_argument("--version", action="version", version=f"weightlora {__version__}")
    subs = parser.add_subparsers(dest="command", metavar="COMMAND")
    table: dict[str, tuple[argparse.ArgumentParser, Command, bool]] = {}
    for name, (run, takes_rest, text, usage, example) in COMMANDS.items():
        sub = subs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            usage=f"weightlora {name} {usage}",
            epilog=f"example:\n  {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        table[name] = sub, run, takes_rest
        if takes_rest:
            if name == "reproduce":
                sub.add_argument("experiment", metavar="EXPERIMENT", help="table1 to table6, figure2, figure3")
            arguments.add_run_flags(sub)
        elif name == "plan":
            arguments.add_plan_flags(sub)
        elif name == "report":
            sub.add_argument(
                "runs", metavar="RUN", nargs="+", help="a run directory, a record.json, or a folder of runs"
            )
        else:
            sub.add_argument("run", metavar="RUN", help="a run directory")
        sub.add_argument("--json", metavar="FILE", help="write the result for a machine, too (- for standard output)")
    for name in ("train", "select", "probe"):
        table[name][0].add_argument("--method", default=argparse.SUPPRESS, help=METHOD_HELP)
    for name in ("train", "select", "compare", "sweep", "probe", "memory"):
        table[name][0].add_argument("--out", metavar="DIR", default=f"runs/{name}", help=f"default: runs/{name}")
    table["report"][0].add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    for name in ("train", "select", "export", "probe"):
        table[name][0].add_argument("--overwrite", action="store_true", help="replace what is in --out")
    _add_metric_flag(*(table[name][0] for name in ("compare", "sweep", "reproduce", "report")))
    _add_compare_flags(table["compare"][0])
    for name in ("sweep", "reproduce"):
        grids.add_grid_flags(table[name][0])
    for name in ("compare", "sweep", "reproduce"):
        grids.add_cluster_flags(table[name][0])
    for name in ("train", "sweep", "reproduce"):
        table[name][0].add_argument(
            "--dry-run", action="store_true", help="check all that needs no weights or data, and print what would run"
        )
    _add_reproduce_flags(table["reproduce"][0])
    _add_probe_flags(table["probe"][0])
    _add_memory_flags(table["memory"][0])
    _add_export_flags(table["export"][0])
    return parser, table


def _add_metric_flag(*subs: argparse.ArgumentParser) -> None:
    for sub in subs:
        sub.add_argument(
            "--metric",
            choices=(EVAL_LOSS,),
            default=argparse.SUPPRESS,
            help="compare and choose by the loss on the validation rows (lower is better); default: the task's metric",
        )


def _add_export_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="DIR", help="default: RUN/PROFILE")
    sub.add_argument(
        "--profile",
        default="native",
        choices=("native", "portable", "dense", "merged"),
        help="native: stock PEFT; portable: vLLM, SGLang, llama.cpp; dense: the same, every layer; merged: no adapter",
    )


def _add_compare_flags(sub: argparse.ArgumentParser) -> None:
    flag = functools.partial(sub.add_argument, default=argparse.SUPPRESS)
    flag("--methods", help="comma-separated, each NAME or NAME:PRESET; or all (default)")
    flag("--seeds", help="comma-separated (default: 0,1,2)")
    flag(
        "--tune",
        metavar="X,X,...",
        help="choose each method's learning rate on a held-out tenth of the training rows, from these multiples of its"
        " default (such as 0.3,1,3)",
    )


def _add_probe_flags(sub: argparse.ArgumentParser) -> None:
    flag = functools.partial(sub.add_argument, default=argparse.SUPPRESS)
    flag(
        "--mode",
        choices=("cheap", "paper"),
        help="cheap (default): all adapters in one run; paper: one adapter at a time, n runs of T steps for each seed",
    )
    flag("--seeds", help="comma-separated (default: 0,1,2)")
    flag("--gradient-rows", type=int, metavar="N", help="training rows that the gradient is taken over (default: 512)")


def _add_memory_flags(sub: argparse.ArgumentParser) -> None:
    flag = functools.partial(sub.add_argument, default=argparse.SUPPRESS)
    flag("--ranks", help="comma-separated, a pair of curves each (default: 1,8,64)")
    flag("--points", type=int, metavar="N", help="numbers of adapters from none to all (default: 10)")
    flag("--limit", metavar="SIZE", help="the device's memory, such as 16GiB: a line in the picture")


def _add_reproduce_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="DIR", help="default: runs/EXPERIMENT")
    sub.add_argument(
        "--scale", default="full", choices=("full", "small"), help="small: a small model, few steps and rows"
    )


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """No garbage collection meanwhile: a sixth of the time that imports and a trace take."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _quiet_libraries() -> None:
    """Progress is ours; libraries speak when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # What one process says, the others would repeat.
    logging.getLogger("weightlora").setLevel(logging.ERROR if _number() else logging.INFO)
    # Imported by PEFT wherever it is installed, it complains about kernels of its own that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks Transformers by a name that is about to change; no user can do anything about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

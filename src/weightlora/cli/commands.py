"""The commands about one run: settings to a spec, a call, and a few lines about what came of it."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from weightlora.cli.command import (
    Command,
    Given,
    argv,
    option_dry_run,
    option_method,
    option_out,
    option_overwrite,
    option_run,
    say,
)
from weightlora.core.sizes import format_bytes, parse_bytes
from weightlora.cost.plan_spec import PlanConfig
from weightlora.errors import ConfigError
from weightlora.runs.figure_specs import CurveSpec, ProbeSpec
from weightlora.runs.record import EVAL_LOSS, Record
from weightlora.runs.spec import RunSpec
from weightlora.runs.together import follows
from weightlora.settings import typed


def _about(run: Path) -> str:
    """What a card says of a run that has finished."""
    from weightlora.report import card_section
    from weightlora.runs.run import RECORD, finished

    return card_section(Record.read(run / RECORD)) if finished(run) else ""


def _report(given: Given, record: Record, folder: Path) -> int:
    """Print what a run came to; 1 if it failed."""
    from weightlora.runs.run import ADAPTER, ERROR, MODEL, PICTURE

    if follows():
        return 0  # the main process tells
    if record.status != "ok":
        given.show(record.to_json())
        print(f"weightlora: the run failed: {record.error} (see {folder / ERROR})", file=sys.stderr)
        return 1
    from weightlora.report import run_summary

    if record.adapters:
        _draw(record, folder)
    what, where = ("adapter", ADAPTER) if record.n_adapters else ("model", MODEL)
    places = [(what, where), ("picture", PICTURE)]
    said = [f"{name}: {folder / place}" for name, place in places if (folder / place).exists()]
    run = shlex.quote(str(folder))
    said.append(f"next: weightlora report {run}   (what was kept, why, and what it saved, as one page)")
    if (folder / ADAPTER).exists():
        said.append(f"      weightlora export {run} --profile merged   (or portable: vLLM, SGLang; gguf: llama.cpp)")
    given.show(record.to_json(), run_summary(record), *said)
    return 0


def _draw(record: Record, folder: Path) -> None:
    """The picture of the selection, where matplotlib is there to draw it."""
    from weightlora.report import selection_map
    from weightlora.runs.run import PICTURE

    try:
        selection_map(record, folder / PICTURE)
    except ConfigError as error:
        logging.getLogger("weightlora").warning("no picture: %s", error)


def train(given: Given) -> int:
    from weightlora.runs import run
    from weightlora.runs.dry import check, describe

    spec, options = RunSpec.of(given.settings), given.options
    if options.dry_run:
        check(spec)
        given.show_json({"dry_run": True, "config": spec.to_dict()}, f"would run {describe(spec)}")
        return 0
    return _report(given, run.train(spec, options.out, overwrite=options.overwrite, argv=argv()), Path(options.out))


def resume(given: Given) -> int:
    from weightlora.runs import run

    folder = Path(given.options.run)
    return _report(given, run.resume(folder, argv=argv()), folder)


def select(given: Given) -> int:
    from weightlora.runs import run
    from weightlora.runs.serve import placement

    options = given.options
    if options.source is not None:
        if given.settings:
            raise ConfigError(f"--from trains nothing, so {next(iter(given.settings))!r} has no effect; drop it")
        selection, block = placement(options.source, options.format or "peft")
        given.show(selection.to_json(), block)
        return 0
    out = Path(options.out)
    selection = run.select(RunSpec.of(given.settings), out, overwrite=options.overwrite)
    block = placement(out, options.format)[1] if options.format else ""
    given.show(
        selection.to_json(),
        f"kept {selection.k} of {selection.n} adapters: {selection.why}",
        *(f"  {choice.name}" for choice in selection.kept),
        f"selection: {out / run.SELECTION}\nLoraConfig: {out / 'adapter_config.json'}",
        *(["", block] if block else []),
    )
    return 0


def plan(given: Given) -> int:
    from weightlora.cost.plan_text import plan_text
    from weightlora.runs.plan import planner_for

    options = given.options
    memory = None if options.memory is None else parse_bytes(options.memory)
    config = PlanConfig(**typed(PlanConfig, given.flags))
    planner = planner_for(config)
    if options.probe:
        from weightlora.runs.plan import calibrate

        found = calibrate(config, planner, config.device)
        what = "peak of a step" if found.kind == "peak" else "kept for backward"
        say(
            f"probe, micro-batch {found.micro_batch}: {what} predicted {format_bytes(found.predicted)},"
            f" measured {format_bytes(found.measured)}"
        )
        planner = planner_for(config, found.overhead, planner.traces)
    made = planner.plan(memory)
    given.show(made.to_json(), plan_text(made, options.layers).removesuffix("\n"))
    return 0


def export(given: Given) -> int:
    from weightlora.runs.serve import export_run

    options = given.options
    run, out = Path(options.run), Path(options.out) if options.out else Path(options.run) / options.profile
    done = export_run(run, out, options.profile, overwrite=options.overwrite, about=_about(run))
    given.show_json(
        {**asdict(done), "path": str(done.path)},
        f"{done.profile} export: {done.path}",
        f"reloaded and compared: largest logit difference {done.max_difference:.2g} (allowed {done.tolerance:.2g})",
        *done.notes,
    )
    return 0


def push(given: Given) -> int:
    from weightlora.runs import hub

    options = given.options
    run, how = Path(options.run), {"public": options.public, "dry_run": options.dry_run}
    done = hub.push(run, options.repo, options.profile, about=_about(run), **how)
    seen = "private" if done.private else "public"
    given.show_json(
        asdict(done),
        f"would push to {done.repo} ({seen}):" if done.url is None else f"pushed to {done.url} ({seen}):",
        *(f"  {name}  {format_bytes(size)}" for name, size in done.files),
        *done.notes,
    )
    return 0


def report(given: Given) -> int:
    from weightlora.report import report as make

    made = make(given.options.runs, metric=given.options.metric)
    for line in made.left_out:
        say(f"left out: {line}")
    out = made.write(given.options.out)
    given.show(made.json, f"report of {made.runs} run{'s' if made.runs > 1 else ''}: {out}")
    return 0


def probe(given: Given) -> int:
    from weightlora.report.probe_plot import Probe, probe_plot
    from weightlora.runs import probe as probing

    folder = Path(given.options.out)
    config = ProbeSpec.of(given.settings)
    data = probing.probe(config, folder, overwrite=given.options.overwrite, argv=argv(), say=say)
    probe_plot(Probe.from_dict(data), folder / probing.PICTURE)
    given.show(json.dumps(data, indent=1), f"products: {folder / probing.PROBE}\npicture: {folder / probing.PICTURE}")
    return 0


def memory(given: Given) -> int:
    from weightlora.report.memory_plot import memory_plot
    from weightlora.runs import figure3

    folder = Path(given.options.out)
    data = figure3.memory_curve(CurveSpec.of(given.settings), folder, argv=argv(), say=say)
    memory_plot(data, folder / figure3.PICTURE)
    given.show(json.dumps(data, indent=1), f"bytes: {folder / figure3.CURVE}\npicture: {folder / figure3.PICTURE}")
    return 0


def _add_new(parser: argparse.ArgumentParser, out: str) -> None:
    option_method(parser)
    option_out(parser, out)
    option_overwrite(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_new(parser, "runs/train")
    option_dry_run(parser)


def _add_select(parser: argparse.ArgumentParser) -> None:
    _add_new(parser, "runs/select")
    parser.add_argument(
        "--format",
        choices=("peft", "trl", "axolotl", "llama-factory", "unsloth"),
        help="also print the block to paste into this trainer's own file",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="RUN",
        help="a finished run, or an earlier --out: print its block (--format, default: peft), and train nothing",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of a device, such as 16GiB: find the micro-batch that fits, or say what would fit",
    )
    parser.add_argument("--layers", action="store_true", help="show what each block keeps, too")
    parser.add_argument(
        "--probe", action="store_true", help="run one step on random weights, and correct the plan by it"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    option_run(parser)
    option_out(parser, None, shown="RUN/PROFILE")
    option_overwrite(parser)
    _option_profile(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    option_run(parser)
    parser.add_argument("repo", metavar="REPO", help="owner/name on the hub")
    _option_profile(parser)
    parser.add_argument("--public", action="store_true", help="let everybody see it (default: a private repository)")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; print what would go")


def _option_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default="native",
        choices=("native", "portable", "dense", "gguf", "merged"),
        help="native: stock PEFT; portable: vLLM, SGLang; dense: the same, every layer; gguf: llama.cpp; merged: no"
        " adapter",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, a record.json, or a folder of runs")
    option_out(parser, "report.html", metavar="FILE")
    parser.add_argument(
        "--metric",
        choices=(EVAL_LOSS,),
        help="compare by the loss on the validation rows (lower is better); default: the task's metric",
    )


COMMANDS = {
    "train": Command(
        help="train one model with one method",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora train --task sst2 --data-dir DATA --method weightlora --k 9 --max-steps 200 --out sst2",
        add=_add_train,
        run=train,
        takes_run=True,
        shared=True,
    ),
    "resume": Command(
        help="go on with an interrupted run",
        usage="RUN [--json FILE]",
        example="weightlora resume runs/sst2",
        add=option_run,
        run=resume,
        shared=True,
    ),
    "select": Command(
        help="choose adapters only: selection.json and a LoraConfig for any trainer",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora select --task sst2 --data-dir DATA --k 9 --max-steps 400 --out chosen\n"
        "  weightlora select --from chosen --format axolotl",
        add=_add_select,
        run=select,
        takes_run=True,
    ),
    "probe": Command(
        help="draw the paper's Figure 2: how much each adapter would still change the loss",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora probe --task sst2 --data-dir DATA --seeds 0,1,2 --k 9 --max-steps 400 --out probe",
        add=partial(_add_new, out="runs/probe"),
        run=probe,
        specs=(ProbeSpec,),
        title="probe",
        takes_run=True,
    ),
    "memory": Command(
        help="draw the paper's Figure 3: memory against the number of adapters",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora memory --task sst2 --data-dir DATA --model deberta-v3-base-shape --limit 16GiB",
        add=partial(option_out, default="runs/memory"),
        run=memory,
        specs=(CurveSpec,),
        title="curves",
        takes_run=True,
    ),
    "plan": Command(
        help="say what memory a run would take, and what fits",
        usage="[--memory SIZE] [FLAGS]",
        example="weightlora plan --model llama-3-8b --length 2048 --memory 40GiB --checkpointing\n"
        "  weightlora plan --model deberta-v3-base --targets attention --r 8 --k 9 --batch 32 --memory 8GiB",
        add=_add_plan,
        run=plan,
        specs=(PlanConfig,),
        title="plan",
    ),
    "export": Command(
        help="write a run's adapter for a server, or merged into its base",
        usage="RUN [--profile PROFILE] [--out DIR]",
        example="weightlora export runs/sst2 --profile portable --out served",
        add=_add_export,
        run=export,
    ),
    "push": Command(
        help="put a run's adapter on the Hugging Face hub, with card, selection and record",
        usage="RUN REPO [--profile PROFILE] [--public] [--dry-run]",
        example="weightlora push runs/sst2 me/sst2-adapter --dry-run",
        add=_add_push,
        run=push,
    ),
    "report": Command(
        help="show runs in one HTML file: what was kept, why, and what it saved",
        usage="RUN... [--out FILE]",
        example="weightlora report runs/sst2 runs/compare --out report.html",
        add=_add_report,
        run=report,
    ),
}

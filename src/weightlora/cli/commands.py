"""What each command does: flags to a configuration, a call, and a few lines about what came of it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from weightlora.cli import arguments, grids
from weightlora.errors import ConfigError


def _write_json(target: str | None, text: str) -> None:
    if target == "-":
        print(text)
    elif target is not None:
        from weightlora.files import write_text

        write_text(Path(target), text if text.endswith("\n") else text + "\n")


def _report(record: Any, folder: Path, target: str | None) -> int:
    """Print what a run came to; 1 if it failed."""
    from weightlora.runs.run import ADAPTER, ERROR, MODEL
    from weightlora.runs.together import follows

    if follows():
        return 0  # the main process tells
    _write_json(target, record.to_json())
    if record.status != "ok":
        print(f"weightlora: the run failed: {record.error} (see {folder / ERROR})", file=sys.stderr)
        return 1
    from weightlora.report import run_summary

    if record.adapters:
        _draw(record, folder)
    if target != "-":
        print(run_summary(record))
        what, where = ("adapter", ADAPTER) if record.n_adapters else ("model", MODEL)
        if (folder / where).exists():
            print(f"{what}: {folder / where}")
    return 0


def _draw(record: Any, folder: Path) -> None:
    """The picture of the selection, where matplotlib is there to draw it."""
    from weightlora.report import selection_map
    from weightlora.runs.run import PICTURE

    try:
        selection_map(record, folder / PICTURE)
    except ConfigError as error:
        logging.getLogger("weightlora").warning("no picture: %s", error)


def train(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs import run

    config = arguments.run_config(parsed, rest, parser, getattr(parsed, "method", "weightlora"))
    if parsed.dry_run:
        return _dry_run(config, parsed.json)
    record = run.train(config, Path(parsed.out), overwrite=parsed.overwrite, argv=_argv())
    return _report(record, Path(parsed.out), parsed.json)


def _dry_run(config: Any, target: str | None) -> int:
    from weightlora.runs.dry import check, describe

    check(config)
    _write_json(target, json.dumps({"dry_run": True, "config": config.to_dict()}, indent=1))
    if target != "-":
        print(f"would run {describe(config)}")
    return 0


def resume(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs import run

    return _report(run.resume(Path(parsed.run), argv=_argv()), Path(parsed.run), parsed.json)


def select(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.runs import run

    config = arguments.run_config(parsed, rest, parser, getattr(parsed, "method", "weightlora"))
    selection = run.select(config, Path(parsed.out), overwrite=parsed.overwrite)
    _write_json(parsed.json, selection.to_json())
    if parsed.json != "-":
        print(f"kept {selection.k} of {selection.n} adapters: {selection.why}")
        print(*(f"  {choice.name}" for choice in selection.kept), sep="\n")
        print(f"selection: {Path(parsed.out) / run.SELECTION}\nLoraConfig: {Path(parsed.out) / 'adapter_config.json'}")
    return 0


def compare(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.files import write_text
    from weightlora.report import comparison_table
    from weightlora.runs import compare as comparing

    asked = getattr(parsed, "methods", "all")
    seeds = [arguments.whole(text, "seeds") for text in getattr(parsed, "seeds", "0,1,2").split(",")]
    rates = [float(arguments.number(text, "tune")) for text in getattr(parsed, "tune", "").split(",") if text]
    folder = Path(parsed.out)
    # The method with the most settings: each method takes those it has.
    config = arguments.run_config(parsed, rest, parser, "weightlora+")
    methods = comparing.all_methods(config) if asked == "all" else [name.strip() for name in asked.split(",")]
    records = comparing.compare(
        config,
        methods,
        seeds,
        folder,
        tune=rates,
        metric=getattr(parsed, "metric", None),
        cluster=grids.cluster(parsed),
        say=_say,
    )
    table = comparison_table(records)
    write_text(folder / "compare.md", table.to_markdown())
    write_text(folder / "compare.json", table.to_json())
    _write_json(parsed.json, table.to_json())
    if parsed.json != "-":
        print(table.to_text())
    return 0 if all(record.status == "ok" for record in records) else 1


def probe(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.report.probe_plot import Probe, probe_plot
    from weightlora.runs import probe as probing

    run = arguments.run_config(parsed, rest, parser, getattr(parsed, "method", "weightlora"))
    own = {name: getattr(parsed, name) for name in ("mode", "gradient_rows") if name in parsed}
    seeds = tuple(arguments.whole(text, "seeds") for text in getattr(parsed, "seeds", "0,1,2").split(","))
    folder = Path(parsed.out)
    config = probing.ProbeConfig(run=run, seeds=seeds, **own)
    data = probing.probe(config, folder, overwrite=parsed.overwrite, argv=_argv(), say=_say)
    _write_json(parsed.json, json.dumps(data, indent=1))
    probe_plot(Probe.from_dict(data), folder / probing.PICTURE)
    if parsed.json != "-":
        print(f"products: {folder / probing.PROBE}\npicture: {folder / probing.PICTURE}")
    return 0


def memory(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.report.memory_plot import memory_plot
    from weightlora.runs import figure3

    own: dict[str, Any] = {name: getattr(parsed, name) for name in ("points", "limit") if name in parsed}
    if "ranks" in parsed:
        own["ranks"] = tuple(arguments.whole(text, "ranks") for text in parsed.ranks.split(","))
    run = arguments.run_config(parsed, rest, parser, "weightlora")
    folder = Path(parsed.out)
    data = figure3.memory_curve(figure3.CurveConfig(run=run, **own), folder, argv=_argv(), say=_say)
    _write_json(parsed.json, json.dumps(data, indent=1))
    memory_plot(data, folder / figure3.PICTURE)
    if parsed.json != "-":
        print(f"bytes: {folder / figure3.CURVE}\npicture: {folder / figure3.PICTURE}")
    return 0


def plan(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.core import format_bytes, parse_bytes
    from weightlora.cost.plan_text import plan_text
    from weightlora.runs.plan import planner_for

    memory = None if parsed.memory is None else parse_bytes(parsed.memory)
    config = arguments.plan_config(parsed)
    planner = planner_for(config)
    if parsed.probe:
        from weightlora.runs.plan import calibrate

        found = calibrate(config, planner, config.device)
        what = "peak of a step" if found.kind == "peak" else "kept for backward"
        _say(
            f"probe, micro-batch {found.micro_batch}: {what} predicted {format_bytes(found.predicted)},"
            f" measured {format_bytes(found.measured)}"
        )
        planner = planner_for(config, found.overhead, planner.traces)
    made = planner.plan(memory)
    _write_json(parsed.json, made.to_json())
    if parsed.json != "-":
        print(plan_text(made, parsed.layers), end="")
    return 0


def export(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.report import card_section
    from weightlora.runs.record import Record
    from weightlora.runs.run import RECORD, finished
    from weightlora.runs.serve import export_run

    run, out = Path(parsed.run), Path(parsed.out) if parsed.out else Path(parsed.run) / parsed.profile
    about = card_section(Record.read(run / RECORD)) if finished(run) else ""
    done = export_run(run, out, parsed.profile, overwrite=parsed.overwrite, about=about)
    facts = {
        "path": str(done.path),
        "profile": done.profile,
        "max_difference": done.max_difference,
        "tolerance": done.tolerance,
        "rank": done.rank,
        "notes": list(done.notes),
    }
    _write_json(parsed.json, json.dumps(facts, indent=1))
    if parsed.json != "-":
        print(f"{done.profile} export: {done.path}")
        print(
            f"reloaded and compared: largest logit difference {done.max_difference:.2g} (allowed {done.tolerance:.2g})"
        )
        for note in done.notes:
            print(note)
    return 0


def report(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.report import report as make

    made = make(parsed.runs, metric=getattr(parsed, "metric", None))
    for line in made.left_out:
        _say(f"left out: {line}")
    out = made.write(parsed.out)
    _write_json(parsed.json, made.json)
    if parsed.json != "-":
        print(f"report of {made.runs} run{'s' if made.runs > 1 else ''}: {out}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _argv() -> tuple[str, ...]:
    return ("weightlora", *sys.argv[1:])

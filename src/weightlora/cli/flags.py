"""Flags from the specs: every field that has a help text is a flag of its name, and what was given is a mapping."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NoReturn

from weightlora.errors import ConfigError
from weightlora.runs.spec import PARTS, MethodSpec, ModelSpec, TrainingSpec, training_fields, training_values
from weightlora.settings import flat_name
from weightlora.tasks.spec import TaskSpec

# The settings that most methods share. Every other setting of a method is a flag, too.
METHOD_HELP = {
    "k": ("K", "adapters to keep: a count, or a share such as 0.25 (default: 0.25; weightlora(+): --kept 0.6x)"),
    "memory": ("SIZE", "instead of K: bytes that the whole run may take, such as 12GiB (weightlora)"),
    "step_time": ("SHARE", "instead of K: operations of a step, as a share of a step with all adapters, such as 0.7x"),
    "kept": (
        "SHARE",
        "instead of K: bytes kept for the backward pass, as a share of what all adapters keep, such as 0.6x",
    ),
    "share": ("SHARE", "instead of K: as few adapters as hold this share of the total score, such as 0.9"),
    "select_after": ("T", "step after which adapters are chosen, or a share of the run (default: 0.15)"),
    "adapter_rate": ("X", "learning rate of the adapters, as a multiple of the run's (default: the method's)"),
    "b_rate": ("X", "learning rate of B, as a multiple of A's, as in LoRA+ (default: 1)"),
    "score": (None, "what adapters are ranked by: credit, next-credit, trapezoid, gradient, cross-gradient, ..."),
    "coverage": (None, "true: spread the choice over the blocks"),
    "gate_lr": ("X", "learning rate of the gates (omega), the numbers that scale adapters"),
    "growth": (None, "initial values of new ranks: gaussian or qr (weightlora+)"),
    "max_rank": ("N", "highest rank that an adapter may grow to (weightlora+)"),
}


# What other programs call a flag or a command of ours.
ELSEWHERE = {
    "--lr": "--learning-rate",
    "--epochs": "--num-train-epochs",
    "--batch-size": "--per-device-train-batch-size",
    "--steps": "--max-steps",
    "--rank": "--r",
    "--data": "--train-file",
    "--label": "--label-column",
    "--resume": "weightlora resume RUN",
}


def dashed(words: Sequence[str]) -> list[str]:
    """Make ``--max_steps`` and ``--max-steps`` one flag.

    >>> dashed(["--data_dir", "my_data", "--k=3"])
    ['--data-dir', 'my_data', '--k=3']
    """
    flags = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name.replace("_", "-") + equals + value for name, equals, value in flags]


def words_of(settings: Mapping[str, object]) -> list[str]:
    """Write settings as words of a command line.

    >>> words_of({"max_steps": 9, "seeds": [0, 1], "regression": True, "holdout": None})
    ['--max-steps', '9', '--seeds', '0,1', '--regression']
    """
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words += [_flag(name)] if value is True else [_flag(name), text]
    return words


def add_spec(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """Add a flag for each field of a spec. Absent flags leave no trace, so that defaults live in one place only."""
    group = parser.add_argument_group(title)
    for each in fields(kind):
        name = flat_name(each)
        if not each.metadata.get("help") or _flag(name) in parser._option_string_actions:
            continue  # no flag, or one that an earlier spec has
        if each.default is False:
            group.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=each.metadata["help"])
            continue
        group.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            metavar=each.metadata["metavar"],
            choices=each.metadata["choices"] or None,
            help=each.metadata["help"],
        )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add everything that defines a run."""
    add_spec(parser, TaskSpec, "task")
    add_spec(parser, ModelSpec, "model and adapters")
    add_spec(parser, TrainingSpec, "training")
    add_spec(parser, MethodSpec, "method")
    group = parser.add_argument_group("settings of the method")
    for name, (metavar, text) in METHOD_HELP.items():
        group.add_argument(_flag(name), default=argparse.SUPPRESS, metavar=metavar, help=text)
    parser.epilog = (
        (parser.epilog or "") + "\nRECIPE.yaml holds flags as YAML (task: sst2); flags on the command line override it."
        "\nEvery other setting of the method is a flag, too (docs/methods.md): --threshold 0.9, --batches 16."
        "\nSo is every field of transformers.TrainingArguments, under its own name: --learning_rate 3e-4,"
        "\n--max-steps 200, --per_device_train_batch_size 8, --bf16, --gradient_checkpointing, --report_to ..."
    )


def given_settings(
    parsed: argparse.Namespace, rest: Sequence[str], parser: argparse.ArgumentParser
) -> dict[str, object]:
    """The settings of a run that the command line names, as a mapping; what nobody knows is a usage error."""
    from weightlora.methods import METHODS

    names = {flat_name(each) for kind in PARTS.values() for each in fields(kind)} | set(METHOD_HELP)
    found = {name: value for name, value in vars(parsed).items() if name in names}
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in sorted({own for kind in METHODS.values() for own in kind.settings()} - names):
        others.add_argument(_flag(name), default=argparse.SUPPRESS)
    settings, words = others.parse_known_args(list(rest))
    try:
        training, unknown = training_values(words)
    except ConfigError as error:
        parser.error(str(error))  # one usage line: ours
    if unknown:
        for name in sorted(training_fields()):
            if _flag(name) not in parser._option_string_actions:
                others.add_argument(_flag(name))
        refuse_unknown(parser, unknown, others)
    return {**found, **vars(settings), **training}


def refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str], *more: argparse.ArgumentParser) -> NoReturn:
    """End with the usage error for words that nobody takes, and with the flag of these parsers nearest to the first."""
    flags = [flag for each in (parser, *more) for flag in each._option_string_actions]
    given = words[0].partition("=")[0]
    near = difflib.get_close_matches(given, flags, n=1, cutoff=0.7)
    if (ours := ELSEWHERE.get(given)) and (ours in flags or not ours.startswith("--")):
        near = [ours]
    hint = f"; did you mean {near[0]}?" if near else ""
    parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

"""The command line: arguments in, exit code out. 0 success, 1 a run failed, 2 a mistake in what was asked."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from weightlora import __version__
from weightlora.cli import commands, studies
from weightlora.cli.command import Command, Given
from weightlora.cli.flags import add_run, add_spec, dashed, given_settings, refuse_unknown
from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.files import disk_is_full, why_not_written
from weightlora.runs.recipe import read_recipe
from weightlora.runs.together import follows, launched
from weightlora.settings import flat_name

COMMANDS: dict[str, Command] = {
    name: (commands.COMMANDS | studies.COMMANDS)[name]
    for name in (
        "train", "resume", "select", "compare", "sweep", "reproduce", "probe", "memory", "plan", "export", "push",
        "report",
    )
}  # fmt: skip

# Packages that only some commands need, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(("datasets", "sklearn", "scipy", "rouge_score"), "tasks"),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    "ray": "ray",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    # PEFT 0.20 says so of a base that has no name, whenever it is saved.
    warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
    words = dashed(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        parser = build_parser()
        if words:
            parser.parse_args(words)
        else:
            parser.print_help()
        return 2
    name = words[0]
    options = argparse.Namespace()
    try:
        # The time of a plan is imports and one trace, where little dies that collecting could find.
        with _collection_paused() if name == "plan" else contextlib.nullcontext():
            _check_processes(name, words)
            return COMMANDS[name].run(_read(name, words[1:], options))
    except WeightLoRAError as error:
        which = f" (process {follows()})" if follows() else ""
        print(f"weightlora {name}: error: {error}{which}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise  # no package of the user's choice: ours to mend
        print(f"weightlora {name}: error: {_lacking(error.name, extra)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and not disk_is_full(error):
            raise  # no file of the user's: ours to mend
        print(f"weightlora {name}: error: {_about_file(error)}", file=sys.stderr)
        return 1 if disk_is_full(error) else 2
    except KeyboardInterrupt:
        print("\ninterrupted" + _how_to_go_on(name, options), file=sys.stderr)
        return 130


def _read(name: str, words: Sequence[str], options: argparse.Namespace) -> Given:
    """What a user gave: words to options and settings, and a recipe's settings beneath."""
    command = COMMANDS[name]
    recipe = None
    if command.takes_run and name != "reproduce" and words and not words[0].startswith("-"):
        recipe, words = words[0], words[1:]
    parser = command_parser(name)
    beneath = {} if recipe is None else read_recipe(recipe)[0]
    for action in parser._actions:  # a recipe may hold options, too: --overwrite, --out
        if action.default is not argparse.SUPPRESS and action.dest in beneath:
            parser.set_defaults(**{action.dest: beneath.pop(action.dest)})
    _, rest = parser.parse_known_args(words, options)
    if rest and not command.takes_run:
        refuse_unknown(parser, rest)
    if options.json not in (None, "-") and (why := why_not_written(Path(options.json))):
        raise ConfigError(f"--json {options.json} cannot be written: {why}; give a file, or - for standard output")
    if name == "report":  # which loads none of the libraries
        return Given(options=options)
    _quiet_libraries()
    named = {flat_name(each) for kind in command.specs for each in fields(kind)}
    own = {key: value for key, value in vars(options).items() if key in named}
    if not command.takes_run:
        return Given(options=options, flags=own)
    return Given(options=options, recipe=beneath, flags={**own, **given_settings(options, rest, parser)})


def _check_processes(name: str, words: Sequence[str]) -> None:
    """Most commands have nothing to share out among the processes of a launcher, and would all write the same files."""
    if launched() > 1 and (not COMMANDS[name].shared or "--dry-run" in words):
        raise ConfigError(
            f"{launched()} processes were started, but only train and resume can use several; start"
            f" `weightlora {name}` in one process, without torchrun or accelerate launch"
        )


def _lacking(package: str | None, extra: str) -> str:
    return f"the package {package} is missing; pip install 'weightlora[{extra}]', or -e '.[{extra}]' in a checkout"


def _about_file(error: OSError) -> str:
    what = f"{error.filename or 'a file'}: {error.strerror}"
    if disk_is_full(error):
        return f"{what}; free some space, then give the same command again, or `weightlora resume` to a run that began"
    return f"{what}; give a path that exists, and that you may read or write as the command needs"


def entry() -> NoReturn:
    """What the program `weightlora` runs: :func:`main`, and the end of the process."""
    sys.exit(main())


def _how_to_go_on(command: str, options: argparse.Namespace) -> str:
    if command in ("train", "resume"):
        run = options.out if command == "train" else options.run
        return f"; `weightlora resume {run}` goes on from the last checkpoint"
    again = command in ("compare", "sweep", "reproduce", "probe")
    return "; the same command again goes on where it was" if again else ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the program itself, which knows the commands' names."""
    parser = argparse.ArgumentParser(
        prog="weightlora",
        allow_abbrev=False,
        description="Keep only the LoRA adapters a task needs.",
        epilog="weightlora COMMAND --help tells more. Exit codes: 0 success, 1 a run failed, 2 a mistake in the flags.",
    )
    parser.add_argument("--version", action="version", version=f"weightlora {__version__}")
    subs = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subs.add_parser(name, help=command.help, add_help=False)
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with a flag for each field of its specs."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"weightlora {name}",
        description=command.help[0].upper() + command.help[1:] + ".",
        usage=f"weightlora {name} {command.usage}",
        epilog=f"example:\n  {command.example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add(parser)
    for kind in command.specs:
        add_spec(parser, kind, command.title)
    if command.takes_run:
        add_run(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON, too (- for standard output)")
    return parser


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
    logging.getLogger("weightlora").setLevel(logging.ERROR if follows() else logging.INFO)
    # It prints its warnings itself; handed on, each would come twice.
    logging.getLogger("huggingface_hub").propagate = False
    # Imported by PEFT wherever it is installed, it complains about kernels of its own that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks Transformers by a name that is about to change; no user can do anything about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

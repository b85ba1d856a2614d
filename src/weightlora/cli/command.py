"""What a command is: its words of help, the specs whose fields are its flags, and the function that carries it out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightlora.files import write_text
from weightlora.methods.names import NAMES
from weightlora.runs.spec import DEFAULT_METHOD


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user gave to a command.

    ``options``: the command's own. ``recipe``: settings of the recipe file; ``flags``: those of the command line, which
    has the last word.
    """

    options: argparse.Namespace
    recipe: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, object] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """Recipe and flags together."""
        return {**self.recipe, **self.flags}

    def show(self, result: str, *lines: str) -> None:
        """Write the result for machines where --json asks for it; print lines for people, unless that is the place."""
        target = self.options.json
        if target not in (None, "-"):
            write_text(Path(target), result if result.endswith("\n") else result + "\n")
        said = [result] if target == "-" else list(lines)
        try:
            print("\n".join(said), end="\n" if said else "", flush=True)
        except BrokenPipeError:  # whoever reads has read enough, as `| head` does; how it went is still to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def show_json(self, result: object, *lines: str) -> None:
        """:meth:`show` plain data."""
        self.show(json.dumps(result, indent=1, allow_nan=False), *lines)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the program.

    ``add`` gives its parser the options of its own; ``specs`` are classes whose fields are flags under ``title``;
    ``takes_run`` says whether all settings of a run are flags as well, and ``shared`` whether the processes of a
    launcher share its work.
    """

    help: str
    usage: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Given], int]
    specs: tuple[type, ...] = ()
    title: str = "options"
    takes_run: bool = False
    shared: bool = False


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def argv() -> tuple[str, ...]:
    """The command as it was given, for the record."""
    return ("weightlora", *sys.argv[1:])


def option_out(parser: argparse.ArgumentParser, default: str | None, metavar: str = "DIR", shown: str = "") -> None:
    """Add --out."""
    parser.add_argument("--out", metavar=metavar, default=default, help=f"default: {shown or default}")


def option_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")


def option_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that needs no weights or data, and print what would run"
    )


def option_method(parser: argparse.ArgumentParser) -> None:
    """Add --method."""
    text = f"a method: {', '.join(NAMES)} (default: {DEFAULT_METHOD})"
    parser.add_argument("--method", default=argparse.SUPPRESS, help=text)


def option_run(parser: argparse.ArgumentParser) -> None:
    """Add the run directory."""
    parser.add_argument("run", metavar="RUN", help="a run directory")

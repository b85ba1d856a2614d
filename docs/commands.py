"""What ``make docs`` adds: the command line's reference, made from the parsers, and a link to the glossary."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

MARK = "<!-- commands -->"
GLOSSARY = "glossary.md"
OF_A_RUN = ("task", "model and adapters", "training", "method", "settings of the method")
_CELLS = str.maketrans({"|": "\\|", "<": "&lt;", "\n": " "})


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Put the reference where a page asks for it, and the glossary below it. MkDocs calls this for every page."""
    made = markdown.replace(MARK, commands()) if MARK in markdown else markdown
    if page is None or page.file.src_uri == GLOSSARY:
        return made
    return f"{made}\n\n[Glossary]({'../' * page.file.src_uri.count('/')}{GLOSSARY}): the words of these pages.\n"


def commands() -> str:
    """Every command with an example and its flags, as Markdown; what all runs share stands once, at the end."""
    from weightlora.cli.main import COMMANDS, command_parser

    lines = [line for name in COMMANDS for line in _command(name)]
    shared = [group for group in command_parser("train")._action_groups if group.title in OF_A_RUN]
    lines += ["## Flags of a run\n", *(line for group in shared for line in _table(group))]
    return "\n".join(lines)


def _command(name: str) -> Iterator[str]:
    from weightlora.cli.main import COMMANDS, command_parser

    command, parser = COMMANDS[name], command_parser(name)
    yield f"## weightlora {name}\n\n{parser.description}\n"
    yield f"```text\nweightlora {name} {command.usage}\n\n# for example\n{command.example}\n```\n"
    for group in parser._action_groups:
        if group.title not in OF_A_RUN:
            yield from _table(group)
    if command.takes_run:
        yield "It also takes all [flags of a run](#flags-of-a-run).\n"


def _table(group: Any) -> Iterator[str]:
    actions = [action for action in group._group_actions if action.dest != "help"]
    if actions:
        yield f"{group.title.capitalize()}:\n\n| flag | meaning |\n|---|---|"
        yield from (f"| `{_flag(action)}` | {(action.help or '').translate(_CELLS)} |" for action in actions)
        yield ""


def _flag(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    if action.nargs == 0:
        return action.option_strings[-1]
    words = " \\| ".join(map(str, action.choices)) if action.choices else "VALUE"
    return f"{action.option_strings[-1]} {action.metavar or words}"

"""The site: its commands are ones that the program takes, notebooks are their scripts, sentences are short."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.builders import long
from tests.test_docs import FENCE, PAGES, ROOT, title

from weightlora.cli import main as cli
from weightlora.cost.plan_spec import PlanConfig
from weightlora.errors import ConfigError
from weightlora.runs.spec import RunSpec
from weightlora.settings import typed

SHELL = re.compile(r"^```(?:text|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN_WORDS = """\
adapter, adapter path, answer tokens, base, bit for bit, budget, checkpoint, coverage, credit, decision, deepest,
disconnect, engine, export, factors, fold, form, gate, growth, head, held out, K, kept activations, kept bytes,
live, lowest, manifest, method, micro-batch, nats, omega, phase, placement, plan, policy, preset, profile, rank,
recipe, record, report, room, score, seal, seam, selection, setting, setup, spec, stock, study, surgery, survivor,
T, task, trial, warm-up"""
START = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "start").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
MOST_WORDS = 35


def commands(text: str) -> Iterator[list[str]]:
    """The commands of this program in a page's blocks of shell, as words; those that are cut short by dots are not."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:torchrun .*-m )?weightlora +(.*)", line)
            if found and "..." not in line:
                yield shlex.split(found[1], comments=True)


def read(words: list[str]) -> None:
    """Read a command as the program does, without its recipe and without carrying it out."""
    name, *rest = cli.dashed(words)
    if rest and rest[0].endswith(".yaml"):
        rest = rest[1:]
    given = cli._read(name, rest, argparse.Namespace())
    if name == "plan":
        PlanConfig(**typed(PlanConfig, given.flags))
    elif name in ("train", "select"):
        RunSpec.of(given.settings)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")], ids=title)
def test_commands_are_ones_that_the_program_takes(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] in cli.COMMANDS and words[1:2] not in (["[RECIPE.yaml]"], ["COMMAND"]):
            read(words)
        else:
            assert words[0].startswith(("-", "COMMAND", *cli.COMMANDS)), words


def test_a_flag_that_there_is_not_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    page = "```text\n$ weightlora train --kk 3 \\\n  --out x  # a remark\nweightlora plan ...\n```\n"
    assert list(commands(page)) == [["train", "--kk", "3", "--out", "x"]]
    with pytest.raises(SystemExit):
        read(["train", "--kk", "3"])
    assert "unrecognized arguments: --kk" in capsys.readouterr().err
    for words in (["plan", "--quantization", "nf4"], ["train", "--score", "luck"]):
        with pytest.raises(ConfigError, match=words[-1]):
            read(words)


def test_the_command_line_reference_has_every_flag() -> None:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    made = hook.on_page_markdown((ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8"))
    assert hook.MARK not in made
    for name in cli.COMMANDS:
        assert f"## weightlora {name}\n" in made
        for action in cli.command_parser(name)._actions:
            for flag in action.option_strings:
                assert flag in ("-h", "--help") or re.search(rf"`{flag}[ `]", made), flag
    assert hook.on_page_markdown("another page") == "another page"


def test_the_site_shows_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def files(nav: object) -> Iterator[str]:
        for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
            yield from [entry] if isinstance(entry, str) else files(entry)

    shown = list(files(yaml.safe_load(text)["nav"]))
    docs = ROOT / "docs"
    there = [str(path.relative_to(docs)) for kind in ("md", "ipynb") for path in docs.rglob(f"*.{kind}")]
    assert sorted(shown) == sorted(there)


def sentences(text: str) -> Iterator[str]:
    """What is said in a page: prose, list items and cells of tables, without code and markup."""
    text = FENCE.sub("", re.sub(r"<!--.*?-->|<iframe.*?</iframe>", "", text, flags=re.DOTALL))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )| · |\|", text):
        parts = re.split(r"(?<=[.!?:;])\s+", re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block).strip())
        yield from (said for part in parts if (said := " ".join(part.split())))


@pytest.mark.parametrize("page", START, ids=title)
def test_sentences_are_short(page: Path) -> None:
    long = [said for said in sentences(page.read_text(encoding="utf-8")) if len(said.split()) > MOST_WORDS]
    assert long == []


def test_a_long_sentence_is_found() -> None:
    page = f"# Title\n\nShort `x y` [one](a.md). {'word ' * 36}end.\n\n```text\n{'word ' * 99}\n```\n- an item\n"
    assert [len(said.split()) for said in sentences(page)] == [2, 3, 37, 2]


def test_words_of_our_own_are_in_the_glossary() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    explained = {word.strip().removeprefix("to ") for marked in re.findall(r"\*{1,2}([^*]+)\*{1,2}", glossary)
                 for word in marked.split(",")}  # fmt: skip
    assert set(" ".join(OWN_WORDS.split()).split(", ")) - explained == set()


def cells(script: str) -> list[tuple[str, str]]:
    """Kind and text of each cell of a script in the percent format, without its header."""
    parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    made = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if "[markdown]" in mark else "code"
        lines = [re.sub(r"^# ?", "", line) if kind == "markdown" else line for line in text.strip().splitlines()]
        made.append((kind, "\n".join(lines)))
    return made


@pytest.mark.parametrize("script", NOTEBOOKS, ids=title)
def test_notebooks_are_their_scripts_with_outputs(script: Path) -> None:
    stored = json.loads((ROOT / "docs" / "tutorials" / f"{script.stem}.ipynb").read_text(encoding="utf-8"))
    said = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    assert said == cells(script.read_text(encoding="utf-8"))
    outputs = [output for cell in stored["cells"] for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert str(Path.home()) not in json.dumps(outputs), "a path of the machine that ran it"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # as the notebooks do themselves
@pytest.mark.parametrize(
    "script",  # one needs the pretrained model; docs/tutorials/llm.md runs it, too
    [*long(*(n for n in NOTEBOOKS if n.stem == "smollm2")), *(n for n in NOTEBOOKS if n.stem != "smollm2")],
    ids=title,
)
def test_notebooks_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTLORA_SMALL", "1")
    monkeypatch.setattr(sys, "argv", [script.name])
    level, shown = logging.root.manager.disable, datasets.is_progress_bar_enabled()
    try:
        exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "__main__"})
    finally:
        logging.disable(level)
        if shown:
            datasets.enable_progress_bars()

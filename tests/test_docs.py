"""The documents: Python in them runs, commands are ones that the program takes, and what they link to exists.

A page's blocks of Python run one after the other, in one namespace, as a reader would run them. ``<!-- run -->`` above
a block says so; ``<!-- run: smollm2 -->`` names a fixture without which it cannot, and ``<!-- no-run: why -->`` leaves
it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any
from urllib.parse import unquote

import pytest

import weightlora
import weightlora.methods
import weightlora.report
import weightlora.tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- *(no-run|run)(?:: *([^>]*?))? *-->\n+)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True, kw_only=True)
class Block:
    line: int
    mark: str  # "run", "no-run", or ""
    about: str  # of "run" the fixture that it needs, of "no-run" the reason
    code: str


def blocks(text: str) -> list[Block]:
    return [
        Block(line=text.count("\n", 0, found.start(3)) + 1, mark=found[1] or "", about=found[2] or "", code=found[3])
        for found in BLOCK.finditer(text)
    ]


def compiled(block: Block, name: str) -> CodeType:
    """A block as code, whose line numbers are those of the page."""
    return compile("\n" * (block.line - 1) + block.code, name, "exec", dont_inherit=True)


def run(page: Sequence[Block], name: str, given: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Execute the blocks of a page, one after the other in one namespace, as a reader would, who has ``given``."""
    space = {"__name__": "__main__", **given}
    for block in page:
        exec(compiled(block, name), space)


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that point to nothing."""
    targets = [one or other for one, other in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    files = [unquote(t.partition("#")[0]) for t in targets if not re.match(r"[a-z][a-z+.-]*:", t)]
    return [file for file in files if file and not (page.parent / file).exists()]


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def own_trainer() -> dict[str, Any]:
    """What a reader has already: a model, rows and arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    rows = [{"input_ids": [1, 2 + i % 7, 3], "labels": [1, 2 + i % 7, 3]} for i in range(32)]
    args = TrainingArguments("out", max_steps=8, per_device_train_batch_size=4, report_to="none", use_cpu=True)
    return {"model": LlamaForCausalLM(config), "rows": rows, "args": args}


@pytest.fixture
def placement_table() -> dict[str, Any]:
    return {"table": str(ROOT / "benchmarks" / "results" / "placement-minilm-docstrings.json")}


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: it is installed on Linux x86_64 alone")


CODE = {page: found for page in PAGES if (found := blocks(page.read_text(encoding="utf-8")))}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("page", CODE, ids=title)
def test_python_in_the_documents(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightlora import methods

    monkeypatch.chdir(tmp_path)
    runs = [block for block in CODE[page] if block.mark == "run"]
    given: dict[str, Any] = {}
    for fixture in {block.about for block in runs} - {""}:
        found = request.getfixturevalue(fixture)  # skips, loudly, where there is none
        given |= found if isinstance(found, dict) else {}
    known = dict(methods.METHODS)
    run(runs, str(page), given)
    added = set(methods.METHODS) - set(known)  # a page shows how to add one; other tests go through all
    for name in added:
        del methods.METHODS[name]


def test_every_block_runs_or_says_why_not() -> None:
    silent = [
        f"{title(page)}:{block.line}"
        for page, found in CODE.items()
        for block in found
        if block.mark == "" or (block.mark == "no-run" and not block.about)
    ]
    assert silent == []
    for page, found in CODE.items():
        for block in found:
            compiled(block, str(page))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


PROOF = re.compile(r"`(test_\w+)`|\b((?:tests|benchmarks|recipes|notebooks)/[\w./-]*\w)")
DATED = ("CHANGELOG.md", "log.md")  # say what was there on their day


def lost_proofs(text: str, tests: str) -> list[str]:
    """Tests and files that a page names, and that do not exist. ``tests`` is the source of all tests."""
    named = PROOF.findall(text)
    return sorted(
        {test for test, _ in named if test and f"def {test}(" not in tests}
        | {file for _, file in named if file and "NAME" not in file and not (ROOT / file).exists()}
    )


def test_every_test_and_file_that_a_page_names_exists() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    lost = {
        title(page): lost_proofs(page.read_text(encoding="utf-8"), tests) for page in PAGES if page.name not in DATED
    }
    assert {page: names for page, names in lost.items() if names} == {}
    assert lost_proofs("`test_b`, `test_a`; see tests/test_docs.py, benchmarks/gone.json.", "def test_a(") == [
        "benchmarks/gone.json",
        "test_b",
    ]


SAMPLE = """\
text
```python
a = 1
```
<!-- run: smollm2 -->
```python
b = 2
```
<!-- run -->
```python
raise KeyError("executed", b)
```
<!-- no-run: it is no Python -->

```python
this is no Python
```
```text
nor this
```
"""


def test_blocks_are_found_with_their_marks() -> None:
    assert [(b.line, b.mark, b.about, b.code) for b in blocks(SAMPLE)] == [
        (3, "", "", "a = 1\n"),
        (7, "run", "smollm2", "b = 2\n"),
        (11, "run", "", 'raise KeyError("executed", b)\n'),
        (16, "no-run", "it is no Python", "this is no Python\n"),
    ]


def test_broken_blocks_fail() -> None:
    _, before, executed, wrong = blocks(SAMPLE)
    with pytest.raises(KeyError, match="executed"):
        run([before, executed], "sample")
    with pytest.raises(SyntaxError) as caught:
        compiled(wrong, "sample")
    assert caught.value.lineno == 16


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there is.md").touch()
    page = tmp_path / "page.md"
    page.write_text(
        '[a](there%20is.md#x) [b](gone.md) ![c](no.png) [d](https://e.org/f) [e](#g) <img src="lost.svg">\n'
        "```\n[in code](nowhere.md)\n```\n"
    )
    assert dead_links(page) == ["gone.md", "no.png", "lost.svg"]


def test_the_adapter_paths_tables_are_what_the_result_files_hold() -> None:
    page = (ROOT / "docs" / "adapter-path.md").read_text(encoding="utf-8")
    shown = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in page.splitlines() if line.count("|") > 3}
    files = sorted((ROOT / "benchmarks" / "results").glob("adapter-path-*.json"))
    assert files
    for file in files:
        for name, row in json.loads(file.read_text(encoding="utf-8"))["rows"].items():
            cells = [name, f"{row['kept_activation_bytes'] / 2**20:.1f}", f"{row['flops'] / 1e9:.1f}"]
            if "llama-512-cpu-dropout0.json" in file.name:
                continue  # counted beside the page's table, with dropout 0.05
            if any(timed in file.name for timed in ("minilm", "deberta", "smollm2")):
                keys = ("times_faster_than_stock", "cpu_times_faster_than_stock")
                cells += [f"{row[key]:.2f}" if key in row else "" for key in keys]
            assert tuple(cells) in shown, (file.name, name)


def test_the_glossary_has_every_public_name_once() -> None:
    """One noun for one thing: a new public name is a word of the glossary, or stands beside one."""
    rooms = (weightlora, weightlora.methods, weightlora.tasks, weightlora.report)
    public = {name for room in rooms for name in room.__all__}
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
        if "|" in line
    ]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[3])]
    words = [row[1].strip() for row in rows]
    assert sorted(listed) == sorted(public)
    assert len(set(words) - {"word", "---"}) == len([word for word in words if word not in ("word", "---")])

"""The documents: Python in them compiles (or runs), and what they link to exists.

A block after ``<!-- no-run -->`` is left alone, one after ``<!-- run -->`` is executed, any other is compiled.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest

import weightlora
import weightlora.methods
import weightlora.report
import weightlora.tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- *(no-run|run) *-->\n+)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True, kw_only=True)
class Block:
    line: int
    mark: str  # "", "run" or "no-run"
    code: str


def blocks(text: str) -> list[Block]:
    return [
        Block(line=text.count("\n", 0, found.start(2)) + 1, mark=found[1] or "", code=found[2])
        for found in BLOCK.finditer(text)
    ]


def run(block: Block, name: str) -> None:
    """Compile a block, and execute it when it is marked so. Line numbers are those of the page."""
    code = compile("\n" * (block.line - 1) + block.code, name, "exec", dont_inherit=True)
    if block.mark == "run":
        exec(code, {"__name__": "__main__"})


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that point to nothing."""
    targets = [one or other for one, other in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    files = [unquote(t.partition("#")[0]) for t in targets if not re.match(r"[a-z][a-z+.-]*:", t)]
    return [file for file in files if file and not (page.parent / file).exists()]


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


CODE = [
    pytest.param(page, block, id=f"{title(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page.read_text(encoding="utf-8"))
    if block.mark != "no-run"
]


@pytest.mark.parametrize(("page", "block"), CODE)
def test_python_in_the_documents(page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightlora import methods

    monkeypatch.chdir(tmp_path)
    known = dict(methods.METHODS)
    run(block, str(page))
    added = set(methods.METHODS) - set(known)  # a page shows how to add one; other tests go through all
    for name in added:
        del methods.METHODS[name]


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


SAMPLE = """\
text
```python
a = 1
```
<!-- run -->
```python
raise KeyError("executed")
```
<!-- no-run -->

```python
this is no Python
```
```text
nor this
```
"""


def test_blocks_are_found_with_their_marks() -> None:
    assert [(b.line, b.mark, b.code) for b in blocks(SAMPLE)] == [
        (3, "", "a = 1\n"),
        (7, "run", 'raise KeyError("executed")\n'),
        (12, "no-run", "this is no Python\n"),
    ]


def test_broken_blocks_fail() -> None:
    _, executed, wrong = blocks(SAMPLE)
    with pytest.raises(KeyError, match="executed"):
        run(executed, "sample")
    with pytest.raises(SyntaxError) as caught:
        run(wrong, "sample")
    assert caught.value.lineno == 12


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
            if "minilm" in file.name or "deberta" in file.name:
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

"""The page in a real browser: it complains of nothing, asks for nothing, shows every chart, runs no markup."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.report.browser import Browser, Page, chromium, overflowing
from tests.report.runs import HOSTILE, hostile, unfinished, write_checkpoint, write_run

from weightlora.report import report
from weightlora.runs.record import Record

Make = Callable[..., Record]
SIZES = [(390, False), (390, True), (1440, False), (1440, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("NO BROWSER: the page was not opened; install Debian's package chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


def methods(make: Make, folder: Path, shape: str = "bert") -> Path:
    """Three methods with three seeds each, as `compare` leaves them."""
    for method in ("weightlora", "random", "lora"):
        for seed in range(3):
            record = make(shape, seed=seed, method=method, metrics={"accuracy": 0.8 + seed / 50})
            if method == "lora":
                every = tuple(dataclasses.replace(a, kept=True) for a in record.adapters)
                record = make(shape, k=len(every), seed=seed, method=method, seam_step=None, phases=record.phases[-1:])
            write_run(folder / f"{method}-recommended" / f"seed-{seed}", record)
    return folder


def scored(record: Record) -> Record:
    """The same run, ranked by a score."""
    adapters = tuple(dataclasses.replace(a, score=0.01 * n + a.kept) for n, a in enumerate(record.adapters))
    return dataclasses.replace(record, adapters=adapters)


def shown(browser: Browser, page: Path, width: int, dark: bool = False) -> Page:
    """The page with every run unfolded, after a look at what must hold for every page of ours."""
    seen = browser.open(page, width, dark=dark)
    assert seen.ask("document.querySelector('footer') !== null")
    assert seen.complaints() == []
    assert seen.requests() == [page.as_uri()]
    seen.ask("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
    assert overflowing(seen) == []
    assert seen.ask("document.documentElement.scrollWidth") == width
    return seen


def overlaps(page: Page) -> list[str]:
    """Pairs of words in one picture that lie on each other."""
    found: list[str] = page.ask(
        """[...document.querySelectorAll("figure > svg")].flatMap(svg => {
            const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
            return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
                Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2 &&
                Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4
            ).map(([b]) => `${svg.parentElement.dataset.picture}: ${a} / ${b}`));
        })"""
    )
    return found


def test_what_is_wrong_with_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    wide = '<footer>text</footer><p style="width: 2000px">wide</p>'
    svg = '<figure data-picture="a"><svg><text y="20">one</text><text y="22">two</text></svg></figure>'
    (tmp_path / "bad.html").write_text(
        f"{wide}{svg}<img src='http://127.0.0.1:9/x'><script>console.log(1); no()</script>"
    )
    page = browser.open(tmp_path / "bad.html", 390)
    assert len(page.complaints()) >= 3
    assert page.requests() == [(tmp_path / "bad.html").as_uri(), "http://127.0.0.1:9/x"]
    assert any(line.startswith("P.: wide") for line in overflowing(page))
    assert overlaps(page) == ["a: one / two"]


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_one_run_shows_every_chart(browser: Browser, make: Make, tmp_path: Path, width: int, dark: bool) -> None:
    path = report([write_run(tmp_path / "run", scored(make()))]).write(tmp_path / "report.html")
    page = shown(browser, path, width, dark)
    pictures = page.ask(
        """[...document.querySelectorAll("figure")].map(f => {
            const svg = f.querySelector(":scope > svg"), box = svg.getBoundingClientRect();
            const paths = svg.querySelectorAll("path").length, scale = svg.getScreenCTM().a;
            const letters = [...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize));
            return [f.dataset.picture, box.width, box.height, paths, scale * Math.min(...letters)];
        })"""
    )
    assert [name for name, *_ in pictures] == ["selection", "omega", "scores", "loss", "metric", "costs"]
    for name, wide, tall, paths, letters in pictures:
        assert 280 < wide <= 480, name
        assert tall > 80, name
        assert paths > 3, name
        assert letters > 9, f"{name}: letters of {letters} pixels"
    assert overlaps(page) == []
    size = page.screenshot(tmp_path / "shot.png")
    assert size[0] == width
    background = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


@pytest.mark.parametrize("shape", ["deberta", "llama", "bart", "holes", "one"])
def test_every_shape_of_model_fits(browser: Browser, make: Make, tmp_path: Path, shape: str) -> None:
    path = report([write_run(tmp_path / "run", make(shape))]).write(tmp_path / "report.html")
    assert overlaps(shown(browser, path, 390)) == []


@pytest.mark.parametrize("width", [390, 1440])
def test_a_comparison(browser: Browser, make: Make, tmp_path: Path, width: int) -> None:
    path = report([methods(make, tmp_path / "compare")]).write(tmp_path / "report.html")
    page = shown(browser, path, width)
    names = page.ask("[...document.querySelectorAll('.comparison figure')].map(f => f.dataset.picture)")
    assert names == ["spread", "overlap", "frequency", "frequency"]
    assert page.ask("document.querySelectorAll('details.run').length") == 9
    assert overlaps(page) == []
    page.screenshot(tmp_path / "shot.png")


def test_the_copy_button_hands_over_the_whole_text(browser: Browser, make: Make, tmp_path: Path) -> None:
    path = report([write_run(tmp_path / "run", make())]).write(tmp_path / "report.html")
    page = shown(browser, path, 1440)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    button = "[...document.querySelectorAll('.copy button')].at(-1)"
    page.ask(f"{button}.click()")
    page.ask("new Promise(done => setTimeout(done, 100))")
    assert page.ask(f"{button}.textContent") == "Copied"
    config = page.ask("[...document.querySelectorAll('.copy code')].at(-1).textContent")
    assert page.ask("navigator.clipboard.readText()") == config
    assert config.startswith("from peft import LoraConfig")


def test_printing_unfolds_every_run(browser: Browser, make: Make, tmp_path: Path) -> None:
    path = report([methods(make, tmp_path / "compare")]).write(tmp_path / "report.html")
    page = browser.open(path, 1440)
    assert page.ask("document.querySelectorAll('details[open]').length") == 0
    assert page.pdf().startswith(b"%PDF")
    assert page.ask("document.querySelectorAll('details[open]').length") == 9


def test_runs_that_died_open_and_say_so(browser: Browser, make: Make, tmp_path: Path) -> None:
    whole = make()
    early, late, crashed, nothing = (tmp_path / "runs" / name for name in ("early", "late", "crashed", "nothing"))
    write_run(early, unfinished(whole))
    write_checkpoint(early, whole, 40, selected=False)
    write_run(late, unfinished(whole))
    write_checkpoint(late, whole, 100, selected=False)
    write_checkpoint(late, whole, 240, selected=True)
    write_run(crashed, unfinished(whole, "failed", "OutOfMemoryError: no room"))
    write_run(nothing, unfinished(whole))
    path = report([tmp_path / "runs"]).write(tmp_path / "report.html")
    page = shown(browser, path, 390)
    seen = page.ask(
        """[...document.querySelectorAll("details.run")].map(run => [run.querySelector(".place").textContent,
            run.querySelector(".pill").textContent, run.querySelector(".note").textContent.replace(/\\s+/g, " "),
            [...run.querySelectorAll("figure")].map(f => f.dataset.picture)])"""
    )
    by_name = {Path(place).name: (pill, note, pictures) for place, pill, note, pictures in seen}
    assert by_name["crashed"][0] == "failed"
    assert "OutOfMemoryError: no room" in by_name["crashed"][1]
    assert by_name["crashed"][2] == by_name["nothing"][2] == []
    assert "no checkpoint" in by_name["nothing"][1]
    assert "step 40 of 400" in by_name["early"][1]
    assert by_name["early"][2] == ["omega", "loss", "metric"]
    assert by_name["late"][2] == ["selection", "omega", "loss", "metric"]
    assert f"weightlora resume {late}" in by_name["late"][1]


def test_hostile_names_are_words_and_nothing_else(browser: Browser, make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=window.pwned=1>"
    predicted = {HOSTILE[0]: {HOSTILE[1]: 1.0}}
    for seed in range(2):
        record = hostile(make("deberta", seed=seed))
        write_run(folder / f"{seed}", record, predicted=predicted)
    write_run(folder / "failed", unfinished(hostile(make("deberta")), "failed", HOSTILE[3]))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "record.json").write_text(json.dumps({"schema_version": HOSTILE[1]}))
    path = report([folder]).write(tmp_path / "report.html")
    page = shown(browser, path, 1440)
    assert page.ask("window.pwned") is None
    count = "['script', 'img', 'style', 'iframe', 'b', 'a'].map(tag => document.querySelectorAll(tag).length)"
    assert page.ask(count) == [1, 0, 1, 0, 0, 0]
    attributes = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert page.ask(f"{attributes}.filter(name => name.startsWith('on'))") == []
    text = page.ask("document.documentElement.textContent")
    for words in HOSTILE:
        assert words.replace("\u0000", "") in text.replace("\ufffd", "").replace("\u0000", "")
    assert "49" not in page.ask("document.title")
    assert page.complaints() == []

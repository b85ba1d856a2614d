"""Which runs a report finds and what it says of them, without a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.builders import long
from tests.report.runs import log_of, unfinished, write_checkpoint, write_run

from weightlora.errors import ConfigError
from weightlora.report import report
from weightlora.report.picture import TEMPLATES
from weightlora.report.runfiles import find_runs, read_run
from weightlora.runs.record import Record

Make = Callable[..., Record]


class Words(HTMLParser):
    """The text of a page, its blanks folded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def words(*paths: Path) -> str:
    return Words(report(paths).html).text


def names(*paths: Path) -> list[str]:
    return [run.path.name for run in find_runs(paths).runs]


def test_runs_are_found_by_directory_file_and_folder(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    for seed in (10, 2, 0):
        write_run(folder / "top" / f"seed-{seed}", make(seed=seed))
    write_run(folder / "tune" / "top" / "lr-1", make(seed=0))
    write_run(folder / ".top.k2j4h5g6" / "seed-7", make(seed=7))  # half-written, and its writer died
    alone = write_run(tmp_path / "alone", make())
    assert names(folder) == ["seed-0", "seed-2", "seed-10"]
    assert names(folder / "top" / "seed-2", folder) == ["seed-2", "seed-0", "seed-10"], "each run once"
    assert names(alone / "record.json") == ["alone"]
    assert names(folder / "tune") == ["lr-1"]
    (left,) = find_runs([folder]).left_out
    assert left.startswith(f"{folder / 'tune'}: 1 trials")
    copy = tmp_path / "anything.json"
    copy.write_text((alone / "record.json").read_text())
    assert read_run(copy).record == read_run(alone / "record.json").record
    assert read_run(copy).read_log() == ()


def test_a_record_that_cannot_be_read_is_named_and_the_others_are_shown(make: Make, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "good", make())
    for name, text in (("half", '{"schema_version": 1, "stat'), ("newer", '{"schema_version": 99}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "record.json").write_text(text)
    made = report([tmp_path / "runs"])
    assert made.runs == 1
    assert [line.partition(": ")[0] for line in made.left_out] == [
        str(tmp_path / "runs" / name / "record.json") for name in ("half", "newer")
    ]
    assert "schema version 99; this release reads 1: update weightlora" in Words(made.html).text
    with pytest.raises(ConfigError, match="not strict JSON"):
        report([tmp_path / "runs" / "half"])


def test_a_path_without_runs_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone does not exist; give a run directory, a record.json, or a folder"):
        report([tmp_path / "gone"])
    with pytest.raises(ConfigError, match=r"holds no run: there is no record.json in it or below"):
        report([tmp_path])
    with pytest.raises(ConfigError, match="name one or more run directories"):
        report([])


def test_the_page_says_what_the_record_says(make: Make, tmp_path: Path) -> None:
    record = make("deberta", k=5, config={"task": "sst2", "model": "deberta", "method": "weightlora", "seed": 0})
    text = words(write_run(tmp_path / "run", record))
    for expected in (
        "accuracy 0.8922",
        "5 of 36 adapters",
        "1545.0 MiB",
        "455.0 MiB",
        "3.40x less",
        "434.7 GFLOP",
        "2.00x less",
        "warmup final change",
        "8 x 2 8 x 1",
        "Why these: the largest omega at step 100",
        "weightlora train \\ --task sst2 --model deberta \\ --method weightlora --seed 0",
        "lora_alpha=32",
    ):
        assert expected in text, expected
    for entry in record.kept:
        assert f"'{entry.name}'," in text


def test_stars_stand_for_what_was_kept(make: Make, tmp_path: Path) -> None:
    for shape, k in (("bert", 9), ("bart", 20), ("llama", 56), ("holes", 2)):
        record = make(shape, k=k)
        html = report([write_run(tmp_path / shape, record)]).html
        figure = html.partition('data-picture="selection"')[2].partition("</figure>")[0].partition("</figcaption>")[2]
        cells = re.findall(r'<path class="cell q\d"[^>]* d="([^"]*)"', figure)
        ramp = 9
        assert sum(cell.count("z") for cell in cells) == len(record.adapters) + ramp
        assert figure.count('class="star"') == figure.count('class="frame"') == k
        assert len(re.findall("<title>[^<]*, kept</title>", figure)) == k


def test_predictions_are_set_beside_what_was_measured(make: Make, tmp_path: Path) -> None:
    predicted = {
        "warmup": {"kept_activation_bytes": 1500 * 2**20, "trainable_params": 442_368},
        "final": {"kept_activation_bytes": 460 * 2**20, "optimizer_bytes": 2**20},
    }
    text = words(write_run(tmp_path / "with", make(), predicted=predicted))
    assert "warmup kept activation bytes 1500.0 MiB 1545.0 MiB -2.9%" in text
    assert "warmup trainable params 442.4 k 442.4 k +0.0%" in text
    assert "final kept activation bytes 460.0 MiB 455.0 MiB +1.1%" in text
    assert "final optimizer bytes 1.00 MiB - -" in text
    assert "Predicted" not in words(write_run(tmp_path / "without", make()))
    assert "Predicted" not in words(write_run(tmp_path / "odd", make(), predicted={"what": {}}))


def test_a_checkpoint_completes_an_unfinished_run(make: Make, tmp_path: Path) -> None:
    whole = make("bart", k=20)
    run = write_run(tmp_path / "run", unfinished(whole))
    write_checkpoint(run, whole, 60, selected=False)
    before = read_run(run / "record.json")
    assert (before.checkpoint, before.record.adapters, before.read_log()[-1]["step"]) == (60, (), 60)
    place = write_checkpoint(run, whole, 200, selected=True)
    after = read_run(run / "record.json")
    assert after.checkpoint == 200
    assert after.record.kept == whole.kept
    assert [(a.name, a.block, a.omega, a.kept) for a in after.record.adapters] == [
        (a.name, a.block, a.omega, a.kept) for a in whole.adapters
    ]
    assert (after.record.phases, after.record.seam_step) == (whole.phases[:1], 100)
    for text in ("", "[1]", '{"data": 3}', (place / "weightlora.json").read_text()[:-9]):
        (place / "weightlora.json").write_text(text)
        damaged = read_run(run / "record.json")
        assert (damaged.record, damaged.checkpoint) == (unfinished(whole), 200)
        assert "step 200 of 400" in words(run)
    manifest = {"selection": {"step": "x", "why": 3, "choices": []}, "data": {}}
    (place / "weightlora.json").write_text(json.dumps(manifest))
    assert read_run(run / "record.json").record == unfinished(whole)
    (place / "trainer_state.json").write_text('{"global_step": ')
    assert read_run(run / "record.json").checkpoint == 60


def test_a_log_of_odd_entries_is_drawn_as_far_as_it_goes(make: Make, tmp_path: Path) -> None:
    nan = float("nan")
    log = [3, {"loss": 1.0}, {"loss": nan, "step": 5}, {"loss": "1", "step": 6}, {"step": True, "loss": 1.0}]
    run = write_run(tmp_path / "run", make(), log=[*log, *log_of(make())])  # type: ignore[list-item]
    assert all(set(entry) >= {"step"} for entry in read_run(run / "record.json").read_log())
    assert 'data-picture="loss"' in report([run]).html
    for text in ("", "{", '{"data": []}', '{"data": {"log": {"loss": 1}}}'):
        (run / "weightlora.json").write_text(text)
        assert "No loss curve" in words(run)


def test_full_fine_tuning_has_a_report_too(make: Make, tmp_path: Path) -> None:
    record = make(
        method="full", n_adapters=0, adapters=(), kept=(), k=None, r=None, seam_step=None, phases=make().phases[1:]
    )
    run = write_run(tmp_path / "full", record)
    state = {"global_step": 400, "log_history": [{"loss": 1.0, "step": 100}, {"loss": 0.5, "step": 400}]}
    (run / "checkpoints" / "checkpoint-400").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-400" / "trainer_state.json").write_text(json.dumps(state))
    made = report([run])
    assert json.loads(made.json)["runs"][0]["charts"] == ["loss"]
    assert "every weight trained" in Words(made.html).text
    assert "LoraConfig" not in made.html


def test_runs_that_differ_in_more_than_the_method_are_marked(make: Make, tmp_path: Path) -> None:
    for seed, length in ((0, 48), (1, 64)):
        config = {"max_length": length, "seed": seed, "training": {"learning_rate": 1e-3 * (1 + seed)}}
        write_run(tmp_path / "runs" / str(seed), make(seed=seed, config=config))
    text = words(tmp_path / "runs")
    assert "the runs differ in max_length: 48, 64" in text
    assert "the runs differ in learning_rate: 0.001, 0.002" in text
    assert "differ in seed" not in text


def test_tasks_are_compared_apart(make: Make, tmp_path: Path) -> None:
    for seed in (0, 1):
        for task in ("sst2", "mrpc"):
            write_run(tmp_path / "runs" / f"{task}-{seed}", make(seed=seed, task=task))
    write_run(tmp_path / "runs" / "alone", make(task="rte"))
    data = json.loads(report([tmp_path / "runs"]).json)
    assert [view["rows"][0]["ok"] for view in data["comparisons"]] == [2, 2]
    assert [run["task"] for run in data["runs"]] == ["rte", "mrpc", "mrpc", "sst2", "sst2"]


def test_equal_files_make_equal_pages(make: Make, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make("bart"))
    first = report([run])
    assert report([run]) == first
    path = first.write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == first.html
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(ConfigError, match="is a folder; give the report a file"):
        first.write(tmp_path)


@pytest.mark.parametrize(("runs", "limit"), [(10, 600_000), *long((50, 2_000_000))])
def test_fifty_runs_stay_under_two_megabytes(make: Make, tmp_path: Path, runs: int, limit: int) -> None:
    """Of the model with the most adapters."""
    for seed in range(runs):
        record = make("llama", seed=seed, seam_step=200)
        scored = tuple(dataclasses.replace(a, score=a.omega) for a in record.adapters)
        record = dataclasses.replace(record, adapters=scored)
        write_run(tmp_path / "runs" / str(seed), record, log=log_of(record, 200))
    made = report([tmp_path / "runs"])
    assert made.runs == runs
    assert made.html.count('data-picture="omega"') == runs
    assert len(made.html.encode()) < limit


def test_no_template_turns_escaping_off() -> None:
    for path in TEMPLATES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", text.partition("#}")[2] or text), path.name


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""
    light = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_stand_out_in_both_themes(theme: int) -> None:
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split("@media screen and")[theme]))
    for words_in, ground in (
        *((name, "panel") for name in ("ink", "muted", "kept", "seam", "good", "bad", "wait")),
        *((name, "page") for name in ("ink", "muted")),
        *(("ink", name) for name in ("sunken", "bad-back", "wait-back")),
        ("muted", "warmup"),
        ("seam", "warmup"),
    ):
        assert contrast(colours[words_in], colours[ground]) >= 4.5, (words_in, ground)
    assert contrast(colours["star"], colours["star-edge"]) > 4.5, "a star shows on any cell"
    steps = [contrast(colours[f"q{n}"], colours[f"q{n + 1}"]) for n in range(8)]
    assert min(steps) > 1.1, "neighbouring steps of the ramp can be told apart without colour"


def test_the_command_writes_the_page_and_loads_no_torch(make: Make, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", make())
    code = (
        "import sys; from weightlora.cli.main import main; status = main(sys.argv[1:])\n"
        "print('loaded:', {'torch', 'transformers', 'peft', 'matplotlib.pyplot'} & set(sys.modules)); sys.exit(status)"
    )
    page, facts = tmp_path / "out" / "page.html", tmp_path / "facts.json"
    command = [sys.executable, "-c", code, "report", tmp_path / "runs", "--json", facts, "--out", page]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"report of 1 run: {page}", "loaded: set()"]
    assert page.read_text().startswith("<!doctype html>")
    data = json.loads(facts.read_text())
    assert data["runs"][0]["path"] == str(tmp_path / "runs" / "one")
    assert data["runs"][0]["score"] == 0.8922


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(make: Make, tmp_path: Path, missing: str) -> None:
    write_run(tmp_path / "run", make())
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from weightlora.cli.main import main; sys.exit(main(['report', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "run", "--out", tmp_path / "report.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"weightlora report: error: a report needs {missing}: pip install 'weightlora[report]'"
    assert not (tmp_path / "report.html").exists()

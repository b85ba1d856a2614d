"""The report of real runs, the card of a real export, and gates seen live: one small run for all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.report.test_report_page import Words
from tests.runs.commands import TINY, read, weightlora

SEAM, STEPS = 4, 8


@pytest.fixture(scope="module")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WeightLoRA with gates that learn, watched by TensorBoard where it is installed."""
    folder = tmp_path_factory.mktemp("real") / "run"
    watcher = "tensorboard" if find_spec("tensorboard") else "none"
    words = ("--task", "sst2", "--data-dir", small_data, *TINY, "--method", "weightlora", "--score", "omega")
    words += ("--gate-lr", "2", "--k", "3", "--select-after", SEAM, "--max-steps", STEPS, "--logging-steps", "1")
    words += ("--eval-strategy", "steps", "--eval-steps", "2", "--report-to", watcher, "--out", folder)
    assert weightlora("train", *words) == 0
    return folder


def test_a_real_run_has_every_picture_that_it_can_have(run: Path, tmp_path: Path) -> None:
    page, facts = tmp_path / "report.html", tmp_path / "facts.json"
    assert weightlora("report", run, "--out", page, "--json", facts) == 0
    (entry,) = json.loads(facts.read_text())["runs"]
    record = read(run / "record.json")
    assert entry["charts"] == ["selection", "omega", "loss", "metric", "costs"]
    assert entry["score"] == record["metrics"]["accuracy"]
    assert entry["kept"] == [kept["name"] for kept in record["kept"]]
    text = Words(page.read_text()).text
    for line in json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]:
        assert f"'{line}'" in text
    assert "modules_to_save=['classifier']" in text


def test_the_json_alone_on_standard_output(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora("report", run, "--out", tmp_path / "report.html", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["status"] == "ok"


@pytest.mark.parametrize("words", [(), ("gone",), ("{run}", "--out", "{run}"), ("{run}", "--open")])
def test_mistakes_are_one_line_and_write_nothing(
    words: tuple[str, ...],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weightlora("report", *(word.format(run=run) for word in words)) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_an_export_has_the_runs_numbers(run: Path, tmp_path: Path) -> None:
    assert weightlora("export", run, "--profile", "portable", "--out", tmp_path / "served") == 0
    card = (tmp_path / "served" / "README.md").read_text()
    record = read(run / "record.json")
    measured = card.partition("## What the run measured")[2]
    assert f"`accuracy` {record['metrics']['accuracy']:.4f}" in measured
    assert "| kept activations |" in measured
    assert f"| steps | {SEAM} | {STEPS - SEAM} |" in measured
    assert card.index("## What was kept") < card.index("## What the run measured")


def test_tensorboard_shows_every_gate_of_warm_up(run: Path) -> None:
    if not find_spec("tensorboard"):
        pytest.skip("NO TENSORBOARD: gates were not watched live; pip install tensorboard")
    scalars = watched(run / "checkpoints")
    names = [adapter["name"] for adapter in read(run / "record.json")["adapters"]]
    logged = read(run / "weightlora.json")["data"]["log"]
    assert len(names) == 12
    for name in names:
        told = {entry["step"]: entry[f"omega/{name}"] for entry in logged if f"omega/{name}" in entry}
        assert list(told) == list(range(1, SEAM + 1)), "until the seam, and no longer"
        assert scalars[f"train/omega/{name}"] == pytest.approx(told)
    assert scalars["train/omega/alive"][SEAM] == 3
    assert sorted(scalars["train/loss"]) == list(range(1, STEPS + 1)), "the loss goes on across the seam"
    assert sorted(scalars["eval/accuracy"]) == [2, 4, 6, 8]


def watched(folder: Path) -> Mapping[str, Mapping[int, float]]:
    """``{name: {step: value}}`` of everything that TensorBoard's files below a folder hold."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    return found

"""`weightlora plan` from the outside, and predictions in the record of a real run."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, weightlora
from tests.runs.killer import Killer

PLAN = ("plan", "--model", "bert-tiny-shape", "--length", "16", "--batch", "8", "--k", "3")


def test_a_plan_in_words_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert weightlora(*PLAN, "--memory", "1GiB", "--json", out) == 0
    said = capsys.readouterr().out
    for words in ("warm-up: all 12", "final: 3 of 12", "activations kept", "micro-batch, lowest", "1.0 GiB of memory"):
        assert words in said
    made = read(out)
    assert made["memory"] == 2**30
    assert made["warmup"]["micro_batch"] == 8
    assert {"weights", "adapters", "gradients", "optimizer", "activations"} <= set(made["final"]["parts"])


@pytest.mark.parametrize(("model", "status"), [("bert-tiny-shape", 0), ("nowhere", 2)])
def test_a_process_that_ends_early_says_all_and_how_it_went(
    killer: Killer, model: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", model, "--length", "16", "--batch", "8", "--k", "3"]
    assert weightlora(*words) == status
    assert gc.isenabled()
    here = capsys.readouterr()
    out, err = tmp_path / "out", tmp_path / "err"
    assert killer.finish(killer.start(words, err, out)) == status
    assert out.read_text(encoding="utf-8") == here.out
    assert err.read_text(encoding="utf-8").endswith(here.err)


def test_a_reader_that_has_read_enough_ends_it_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `weightlora plan | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert weightlora(*PLAN) == 0
    assert capsys.readouterr().err == ""


def test_the_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora(*PLAN, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["k"] == 3


def test_a_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora(*PLAN, "--device", "cpu", "--probe", "--layers") == 0
    said = capsys.readouterr()
    assert "What each block keeps for backward" in said.out
    assert "probe, micro-batch 1: kept for backward predicted" in said.err
    assert "warm-up: all 12" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "12 bananas"), "'12 bananas' is not a number of bytes; write for example 16GiB"),
        (("--memory", "8200KiB"), "the nearest that fits is --"),
        (("--memory", "1KiB"), "nothing near it fits"),
        (("--k", "many"), "k='many' is not allowed; use a number"),
        (("--dtype", "float8"), "invalid choice: 'float8'"),
        (("--model", "nobody"), "config of model 'nobody' cannot be read"),
        (("--unknown", "1"), "unrecognized arguments: --unknown"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora(*PLAN, *words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_run_records_what_was_predicted(tmp_path: Path) -> None:
    words = (*TINY, "--method", "weightlora", "--k", "3", "--select-after", "3", "--max-steps", "6", "--bf16")
    words += ("--max-train-samples", "64", "--max-eval-samples", "8", "--micro-batch", "4", "--use-cpu")
    assert weightlora("train", *words, "--out", tmp_path / "run") == 0
    record = read(tmp_path / "run" / "record.json")
    for phase in record["phases"]:
        for field, number in record["predicted"][phase["name"]].items():
            assert phase[field] == number
    assert list(record["predicted"]) == ["final", "warmup"]
    assert weightlora("report", tmp_path / "run", "--out", tmp_path / "r.html", "--json", tmp_path / "r.json") == 0
    assert "prediction is off by" in (tmp_path / "r.html").read_text()

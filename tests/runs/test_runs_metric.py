"""What runs are compared by, and the row without training: `--metric eval_loss`, `zero-shot`, a pretrained decoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.runs.commands import TINY, read, read_rows, weightlora, write_rows

from weightlora.errors import ConfigError
from weightlora.runs.compare import all_methods
from weightlora.runs.config import RunConfig
from weightlora.runs.record import EVAL_LOSS, Record
from weightlora.runs.sweep import Cell, Grid
from weightlora.tasks import tell_once

STEPS = ("--max-steps", "3", "--logging-steps", "1", "--max-train-samples", "24", "--max-eval-samples", "16")
ANSWERS = ("--model", "llama-small-shape", "--classify-by", "answer", "--max-length", "32")


def losses(folder: Path) -> dict[str, float]:
    """By the name of the run's folder, of every run below one."""
    return {path.parent.name: Record.read(path).metrics[EVAL_LOSS] for path in sorted(folder.rglob("record.json"))}


def test_the_rate_with_the_lowest_loss_wins(small_data: Path, tmp_path: Path) -> None:
    """The highest rate of the three has by far the highest loss."""
    flags = ("--task", "sst2", "--data-dir", small_data, *TINY, *STEPS, "--methods", "lora", "--seeds", "0")
    out = tmp_path / "out"
    assert weightlora("compare", *flags, "--tune", "0.1,1,3000", "--metric", EVAL_LOSS, "--out", out) == 0
    tried = losses(out / "tune" / "lora-recommended")
    best = min(tried, key=lambda name: tried[name])
    assert tried["lr-3"] > 2 * tried[best]
    config = read(out / "lora-recommended" / "seed-0" / "config.json")
    assert f"lr-{config['training']['learning_rate']:g}" == best
    table = read(out / "compare.json")
    (row,) = table["rows"]
    assert row["score_mean"] == losses(out / "lora-recommended")["seed-0"]
    assert "eval_loss (lower is better)" in (out / "compare.md").read_text(encoding="utf-8")
    # The runs are the same whatever they are compared by: nothing runs again, and the table is the task's own.
    before = (out / "lora-recommended" / "seed-0" / "record.json").stat().st_mtime_ns
    assert weightlora("compare", *flags, "--learning-rate", config["training"]["learning_rate"], "--out", out) == 0
    assert (out / "lora-recommended" / "seed-0" / "record.json").stat().st_mtime_ns == before
    assert read(out / "compare.json")["rows"][0]["score_mean"] == read_record(out)["metrics"]["accuracy"]
    page = tmp_path / "page.html"
    assert weightlora("report", out, "--metric", EVAL_LOSS, "--out", page, "--json", tmp_path / "page.json") == 0
    assert read(tmp_path / "page.json")["runs"][0]["metric"] == EVAL_LOSS


def read_record(out: Path) -> Any:
    return read(out / "lora-recommended" / "seed-0" / "record.json")


def test_a_sweep_chooses_by_it(small_data: Path, tmp_path: Path) -> None:
    flags = ("--task", "mrpc", "--data-dir", small_data, *TINY, *STEPS, "--methods", "lora", "--seeds", "0")
    out = tmp_path / "out"
    rates = ("--learning-rates", "1e-4,1e-3,3", "--metric", EVAL_LOSS)
    assert weightlora("sweep", *flags, *rates, "--out", out) == 0
    (cell,) = read(out / "sweep.json")["cells"]
    scores = {entry["settings"]["learning_rate"]: entry["score"] for entry in cell["trials"]}
    assert {entry["metric"] for entry in (*cell["trials"], *cell["runs"])} == {EVAL_LOSS}
    assert cell["chosen"]["learning_rate"] == min(scores, key=lambda rate: scores[rate]) < 3
    with pytest.raises(ConfigError, match="metric='accuracy' is not in every record; use eval_loss, or leave it out"):
        Grid(cells=(Cell(row="lora", config=RunConfig()),), metric="accuracy")


def test_a_model_that_answers_in_words(small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training lowers the loss that zero-shot has; its row has no steps, no parameters, and writes no model."""
    flags = ("--task", "sst2", "--data-dir", small_data, *ANSWERS, *STEPS, "--learning-rate", "1e-2")
    flags += ("--methods", "zero-shot,lora,weightlora", "--k", "3", "--select-after", "2", "--seeds", "0")
    out = tmp_path / "out"
    tell_once.cache_clear()
    with caplog.at_level("INFO", logger="weightlora"):
        assert weightlora("compare", *flags, "--metric", EVAL_LOSS, "--out", out) == 0
    assert "answers: negative: 'negative' (1 token); positive: 'positive' (1 token)" in caplog.text
    rows = {row["method"]: row for row in read(out / "compare.json")["rows"]}
    assert all(rows["zero-shot"]["score_mean"] > rows[name]["score_mean"] + 0.1 for name in ("lora", "weightlora"))
    assert rows["zero-shot"]["score_mean"] == pytest.approx(math.log(30522), rel=0.1), "it knows nothing"
    assert (rows["zero-shot"]["trainable_params"], rows["zero-shot"]["adapters_max"]) == (0, 0)
    run = out / "zero-shot-recommended" / "seed-0"
    assert not {"adapter", "model"} & {path.name for path in run.iterdir()}
    record = Record.read(run / "record.json")
    assert (record.phases[0].steps, record.max_steps, record.kept) == (0, 0, ())
    config = read(out / "weightlora-recommended" / "seed-0" / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    trained = out / "weightlora-recommended" / "seed-0"
    assert weightlora("export", trained, "--profile", "merged", "--out", tmp_path / "merged") == 0
    assert weightlora("report", out, "--out", tmp_path / "page.html") == 0


def test_no_words_no_zero_shot(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--task", "sst2", "--data-dir", small_data, *TINY, *STEPS, "--method", "zero-shot")
    assert weightlora("train", *flags, "--out", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "gets a new head (classifier) that knows nothing; use a model that answers in words" in told
    assert not (tmp_path / "run").exists()
    settings = {"task": "sst2", "data_dir": str(small_data)}
    assert "zero-shot" not in all_methods(RunConfig(model="bert-tiny-shape", **settings))
    assert "zero-shot" in all_methods(RunConfig(model="llama-small-shape", classify_by="answer", **settings))


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_pretrained_decoder_by_name(small_data: Path, tmp_path: Path) -> None:
    """The two commands of the manual, in little: a file of completions, and SST-2 by answer tokens."""
    rows = read_rows(small_data / "sst2" / "train.jsonl")[:8]
    texts = [{"prompt": f"{row['sentence']}\nSentiment:", "completion": " good"} for row in rows]
    own = write_rows(tmp_path / "own.jsonl", texts)
    steps = ("--model", "smollm2", "--max-steps", "3", "--per-device-train-batch-size", "2", "--max-eval-samples", "4")
    steps += ("--max-length", "24", "--targets", "v_proj")
    seam = ("--task", "sst2", "--data-dir", small_data, "--k", "21", "--select-after", "2")
    assert weightlora("train", "--task", own, "--method", "lora", *steps, "--out", tmp_path / "own") == 0
    assert weightlora("train", *seam, *steps, "--out", tmp_path / "sst2") == 0
    for name, metric, alive in (("own", "mean_token_accuracy", 30), ("sst2", "accuracy", 21)):
        record = Record.read(tmp_path / name / "record.json")
        assert (record.metric, record.n_adapters, len(record.kept)) == (metric, 30, alive)
        assert math.isfinite(record.metrics[EVAL_LOSS])
    base = json.loads((tmp_path / "sst2" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert base["task_type"] == "CAUSAL_LM"

"""What runs are compared by, and the row without training: `--metric eval_loss`, `zero-shot`, a pretrained decoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, run_folders, spec, weightlora

from weightlora.errors import ConfigError
from weightlora.runs.build import base_model, task_of
from weightlora.runs.record import EVAL_LOSS, Record
from weightlora.study.grid import Cell, Grid, all_methods
from weightlora.tasks import tell_once

STEPS = ("--max-steps", "3", "--logging-steps", "1", "--max-train-samples", "24", "--max-eval-samples", "16")
ANSWERS = ("--model", "llama-small-shape", "--classify-by", "answer", "--max-length", "32")


def losses(run: Path) -> float:
    return Record.read(run / "record.json").metrics[EVAL_LOSS]


def test_the_rate_with_the_lowest_loss_wins(small_data: Path, tmp_path: Path) -> None:
    """The highest rate of the three has by far the highest loss."""
    flags = ("--task", "sst2", "--data-dir", small_data, *TINY, *STEPS, "--methods", "lora", "--seeds", "0")
    out = tmp_path / "out"
    assert weightlora("compare", *flags, "--tune", "0.1,1,3000", "--metric", EVAL_LOSS, "--out", out) == 0
    tried = {rate_of(run): losses(run) for run in run_folders(out, "tune")}
    best = min(tried, key=lambda rate: tried[rate])
    assert tried[3] > 2 * tried[best]
    (run,) = run_folders(out)
    assert rate_of(run) == best
    table = read(out / "table.json")
    (row,) = table["rows"]
    assert row["score_mean"] == losses(run)
    assert "eval_loss (lower is better)" in (out / "table.md").read_text(encoding="utf-8")
    # The runs are the same whatever they are compared by: nothing runs again, and the table is the task's own.
    before = (run / "record.json").stat().st_mtime_ns
    assert weightlora("compare", *flags, "--learning-rate", best, "--out", out) == 0
    assert (run / "record.json").stat().st_mtime_ns == before
    assert read(out / "table.json")["rows"][0]["score_mean"] == read(run / "record.json")["metrics"]["accuracy"]
    page = tmp_path / "page.html"
    assert weightlora("report", out, "--metric", EVAL_LOSS, "--out", page, "--json", tmp_path / "page.json") == 0
    assert read(tmp_path / "page.json")["runs"][0]["metric"] == EVAL_LOSS


def rate_of(run: Path) -> float:
    rate: float = read(run / "config.json")["training"]["learning_rate"]
    return rate


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
        Grid(cells=(Cell(row="lora", spec=spec()),), metric="accuracy")


def test_a_model_that_answers_in_words(small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training lowers the loss that zero-shot has; its row has no steps, no parameters, and writes no model."""
    flags = ("--task", "sst2", "--data-dir", small_data, *ANSWERS, *STEPS, "--learning-rate", "1e-2")
    flags += ("--methods", "zero-shot,lora,weightlora", "--k", "3", "--select-after", "2", "--seeds", "0")
    out = tmp_path / "out"
    tell_once.cache_clear()
    with caplog.at_level("INFO", logger="weightlora"):
        assert weightlora("compare", *flags, "--metric", EVAL_LOSS, "--out", out) == 0
    assert "answers: negative: 'negative' (1 token); positive: 'positive' (1 token)" in caplog.text
    rows = {row["method"]: row for row in read(out / "table.json")["rows"]}
    assert all(rows["zero-shot"]["score_mean"] > rows[name]["score_mean"] + 0.1 for name in ("lora", "weightlora"))
    assert rows["zero-shot"]["score_mean"] == pytest.approx(math.log(30522), rel=0.1), "it knows nothing"
    assert (rows["zero-shot"]["trainable_params"], rows["zero-shot"]["adapters_max"]) == (0, 0)
    (run,) = run_folders(out, method="zero-shot")
    assert not {"adapter", "model"} & {path.name for path in run.iterdir()}
    record = Record.read(run / "record.json")
    assert (record.phases[0].steps, record.max_steps, record.kept) == (0, 0, ())
    (trained,) = run_folders(out, method="weightlora")
    config = read(trained / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert weightlora("export", trained, "--profile", "merged", "--out", tmp_path / "merged") == 0
    assert weightlora("report", out, "--out", tmp_path / "page.html") == 0


def test_no_words_no_zero_shot(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--task", "sst2", "--data-dir", small_data, *TINY, *STEPS, "--method", "zero-shot")
    assert weightlora("train", *flags, "--out", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "gets a new head (classifier) with random weights; use a model that answers in words" in told
    assert not (tmp_path / "run").exists()
    settings = {"task": "sst2", "data_dir": str(small_data)}
    assert "zero-shot" not in all_methods(spec(model="bert-tiny-shape", **settings))
    assert "zero-shot" in all_methods(spec(model="llama-small-shape", classify_by="answer", **settings))
    assert "zero-shot" in all_methods(spec(model="smollm2", **settings)), "a pretrained decoder answers unasked"


@pytest.mark.long
@pytest.mark.usefixtures("smollm2")
def test_the_pretrained_decoder_by_name(small_data: Path, tmp_path: Path) -> None:
    """The command of the manual, in little: SST-2 by answer tokens."""
    steps = ("--model", "smollm2", "--max-steps", "3", "--per-device-train-batch-size", "2", "--max-eval-samples", "2")
    steps += ("--max-length", "24", "--targets", "v_proj", "--dtype", "float32")
    seam = ("--task", "sst2", "--data-dir", small_data, "--k", "21", "--select-after", "2")
    assert weightlora("train", *seam, *steps, "--out", tmp_path / "run") == 0
    record = Record.read(tmp_path / "run" / "record.json")
    assert (record.metric, record.n_adapters, len(record.kept)) == ("accuracy", 30, 21)
    assert math.isfinite(record.metrics[EVAL_LOSS])
    base = read(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert base["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_of_the_dtype_that_was_asked_for(dtype: str) -> None:
    made = spec(task="docstrings", model="bert-tiny-shape", dtype=dtype)
    loaded = base_model(made, task_of(made))
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    with pytest.raises(ConfigError, match="dtype='float16' is unknown; use one of float32, bfloat16"):
        spec(dtype="float16")

"""Tables against numpy, and the promises that keep a table honest."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.errors import ConfigError
from weightlora.report import Table, comparison_table, run_summary
from weightlora.report.units import BYTES, COUNT, FLOPS, SECONDS, Unit, human, ratio
from weightlora.runs.record import PhaseResult, Record

Make = Callable[..., Record]


def run(make: Make, method: str, seed: int, score: float, **changes: Any) -> Record:
    seconds = {"lora": 30.0, "full": 45.0}.get(method, 15.0) + seed
    final = dataclasses.replace(make().phases[-1], steps=100, seconds=seconds)
    fields: dict[str, Any] = {"method": method, "seed": seed, "metrics": {"accuracy": score}, "phases": (final,)}
    return make("deberta", **({"k": 5} | fields | changes))


def failed(make: Make, method: str, seed: int, error: str | None = "out of memory") -> Record:
    return run(
        make, method, seed, 0.0, status="failed", error=error, metrics={}, phases=(), trainable_params={}, kept=()
    )


def full(make: Make, seed: int, score: float) -> Record:
    return run(make, "full", seed, score, kept=(), adapters=(), n_adapters=0, k=None, r=None)


def column(table: Table, title: str) -> list[str]:
    index = [name.replace("~", "") for name in table.titles].index(title)
    return [row[index] for row in table.cells]


@given(st.data())
def test_means_and_spreads_are_numpys(data: st.DataObject) -> None:
    from tests.report.conftest import make_record

    scores = {
        method: data.draw(st.lists(st.floats(-1, 1), min_size=1, max_size=5)) for method in ("lora", "weightlora")
    }
    records = [run(make_record, method, seed, x) for method, xs in scores.items() for seed, x in enumerate(xs)]
    table = comparison_table(data.draw(st.permutations(records)))
    seconds = {}
    for row in table.rows:
        xs = np.asarray(scores[row["method"]])
        assert row["score_mean"] == pytest.approx(xs.mean(), abs=1e-12)
        assert row["score_spread"] == (None if len(xs) == 1 else pytest.approx(xs.std(ddof=1), abs=1e-12))
        base = {"lora": 30.0, "weightlora": 15.0}[row["method"]]
        seconds[row["method"]] = (base + np.arange(len(xs))).mean() / 100
        assert row["seconds_per_step"] == pytest.approx(seconds[row["method"]])
        assert row["seeds"] == list(range(len(xs)))
    for row in table.rows:
        assert row["relative_time"] == pytest.approx(seconds[row["method"]] / seconds["lora"])


def test_the_table_in_words(make: Make) -> None:
    records = [run(make, "lora", 0, 0.88, kept=make("deberta", k=36).kept, adapters=make("deberta", k=36).adapters)]
    records += [run(make, "weightlora", seed, score) for seed, score in enumerate((0.90, 0.92, 0.91))]
    records += [run(make, "weightlora+", 0, 0.9), failed(make, "weightlora+", 1), failed(make, "random", 0)]
    records += [full(make, 0, 0.93)]
    table = comparison_table(records)
    assert column(table, "method") == ["lora", "weightlora", "weightlora+", "random", "full"]
    assert column(table, "seeds") == ["1/1", "3/3", "1/2, 1 failed", "0/1, 1 failed", "1/1"]
    assert column(table, "accuracy") == ["0.8800 ± -", "0.9100 ± 0.0100", "0.9000 ± -", "failed", "0.9300 ± -"]
    assert column(table, "adapters alive") == ["36/36", "5/36", "5/36", "-", "-"]
    assert column(table, "ranks alive") == ["288", "40", "40", "-", "-"]
    assert column(table, "trainable params (k)") == ["61.4"] * 3 + ["-", "61.4"]
    assert column(table, "kept activations (MiB)") == ["455.0"] * 3 + ["-", "455.0"]
    assert column(table, "FLOPs per step (GFLOP)") == ["280.3"] * 3 + ["-", "280.3"]
    assert column(table, "time per step (ms)") == ["300.0", "160.0", "150.0", "-", "450.0"]
    assert column(table, "time vs lora") == ["1.00x", "0.53x", "0.50x", "-", "1.50x"]
    assert table.notes == (
        "failed: weightlora+ (recommended), seed 1: out of memory",
        "failed: random (recommended), seed 0: out of memory",
    )
    assert table.caption == "sst2, deberta, preset recommended: accuracy, mean ± spread over seeds"


def test_without_lora_there_is_no_relative_time(make: Make) -> None:
    table = comparison_table([run(make, "weightlora", 0, 0.9), failed(make, "lora", 0)])
    assert column(table, "time vs lora") == ["-", "-"]


@pytest.mark.parametrize(("flops", "line"), [(70, "can take 117 steps in place of 100"), (98, ""), (None, "")])
def test_fewer_operations_are_said_in_steps(make: Make, flops: int | None, line: str) -> None:
    """Half of the steps as dear as LoRA's, half of them of 0.7 of it: 1 / 0.85 times as many."""
    (final,) = run(make, "lora", 0, 0.9).phases
    lora = (dataclasses.replace(final, steps=100, flops_per_step=100),)
    ours = tuple(dataclasses.replace(final, steps=n, flops_per_step=f) for n, f in ((50, 100), (50, flops)))
    table = comparison_table([run(make, "lora", 0, 0.9, phases=lora), run(make, "top", 0, 0.9, phases=ours)])
    assert [note.rpartition("top ")[2] for note in table.notes if "as many FLOPs" in note] == [line][: bool(line)]


def test_times_of_different_machines_are_not_compared(make: Make) -> None:
    records = [run(make, "lora", 0, 0.9), run(make, "weightlora", 0, 0.9, machine={"cores": 64})]
    table = comparison_table(records)
    assert column(table, "time vs lora") == ["-", "-"]
    assert any("different kinds of machine" in note for note in table.notes)


def test_presets_are_rows_and_lora_of_the_same_preset_is_the_baseline(make: Make) -> None:
    def phases(seconds: float) -> tuple[PhaseResult, ...]:
        return (dataclasses.replace(make().phases[-1], steps=10, seconds=seconds),)

    records = [
        run(make, "lora", 0, 0.9, preset="paper", phases=phases(4.0)),
        run(make, "lora", 0, 0.9, preset="official", phases=phases(8.0)),
        run(make, "weightlora", 0, 0.9, preset="official", phases=phases(2.0)),
        run(make, "weightlora", 0, 0.9, preset="recommended", phases=phases(2.0)),
    ]
    table = comparison_table(records)
    assert column(table, "method") == [
        "lora (paper)",
        "lora (official)",
        "weightlora (official)",
        "weightlora (recommended)",
    ]
    assert column(table, "time vs lora") == ["1.00x", "1.00x", "0.25x", "0.50x"]
    assert "preset" not in table.caption


def test_runs_of_different_k_are_not_one_row(make: Make) -> None:
    table = comparison_table([run(make, "weightlora", 0, 0.9), run(make, "weightlora", 0, 0.8, k=9)])
    assert column(table, "method") == ["weightlora k=5 r=8", "weightlora k=9 r=8"]
    chosen = [dataclasses.replace(run(make, "adalora", seed, 0.8, k=4 + seed), k=None) for seed in (0, 1)]
    together = comparison_table(chosen)
    assert column(together, "method") == ["adalora"]  # how many survived is an outcome
    assert (column(together, "adapters alive"), column(together, "ranks alive")) == (["4-5/36"], ["32-40"])
    early = dataclasses.replace(failed(make, "weightlora", 1), k=None, r=None)
    together = comparison_table([run(make, "weightlora", 0, 0.9), early])
    assert column(together, "seeds") == ["1/2, 1 failed"]


def test_a_diverged_run_is_neither_hidden_nor_averaged_away(make: Make) -> None:
    table = comparison_table([run(make, "lora", 0, 0.9), run(make, "lora", 1, math.nan)])
    assert column(table, "accuracy") == ["nan ± -"]
    assert json.loads(table.to_json(), parse_constant=pytest.fail)["rows"][0]["score_mean"] is None


def test_what_a_reader_must_know_is_noted(make: Make) -> None:
    small = (dataclasses.replace(make().phases[-1], micro_batch=16),)
    records = [
        run(make, "lora", 0, 0.9),
        run(make, "lora", 0, 0.8),
        run(make, "weightlora", 0, 0.9, phases=small),
        run(make, "weightlora", 1, 0.9, status="running"),
        run(make, "weightlora", 2, 0.9, metrics={}),
        failed(make, "top", 0, error=None),
    ]
    assert comparison_table(records).notes == (
        "not finished: weightlora (recommended), seed 1",
        "no accuracy recorded: weightlora (recommended), seed 2; the mean is over the others",
        "failed: top (recommended), seed 0: no reason recorded",
        "lora: several runs of seed 0; the spread is not over seeds alone",
        "kept activations are per micro-batch, and micro-batches differ: 8, 16",
    )


def test_a_number_that_one_run_lacks_is_not_shown(make: Make) -> None:
    blind = (dataclasses.replace(make().phases[-1], flops_per_step=None),)
    table = comparison_table([run(make, "lora", 0, 0.9), run(make, "lora", 1, 0.9, phases=blind)])
    assert column(table, "FLOPs per step (kFLOP)") == ["-"]


@pytest.mark.parametrize("field", ["task", "model", "metric"])
def test_what_has_no_common_mean_is_refused(make: Make, field: str) -> None:
    with pytest.raises(ConfigError, match=f"runs of one {field}, not of .*other"):
        comparison_table([run(make, "lora", 0, 0.9), run(make, "lora", 1, 0.9, **{field: "other"})])


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="no records to compare"):
        comparison_table([])


def test_markdown_has_one_shape(make: Make) -> None:
    table = comparison_table([run(make, "lora", 0, 0.9), failed(make, "weightlora", 0, "a | b\nsecond line")])
    text = table.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(table.titles) + 1}
    assert len(rows) == 2 + len(table.rows)
    assert "~" not in text
    assert r"- failed: weightlora (recommended), seed 0: a \| b second line" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_text_fits_its_width_and_loses_nothing(make: Make, width: int) -> None:
    records = [run(make, "lora", 0, 0.9), full(make, 0, 0.93), run(make, "weightlora+", 1, 0.91)]
    table = comparison_table([*records, failed(make, "weightlora+", 2, "no space left " * 6)])
    text = table.to_text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    words = " ".join(text.split())
    for row in table.cells:
        for cell in row:
            assert cell in words
    assert " ".join(table.notes[0].split()) in words
    side_by_side = any("lora " in line and "0.9000" in line for line in text.splitlines())
    assert side_by_side == (width >= 100)
    whole = comparison_table(records).to_text(width)  # without words of failure a usual terminal is wide enough
    assert any("lora " in line and "0.9000" in line for line in whole.splitlines()) == (width >= 80)


def test_json_holds_plain_numbers(make: Make) -> None:
    data = json.loads(comparison_table([run(make, "weightlora", 3, 0.9)]).to_json())
    (row,) = data["rows"]
    assert row["kept_activation_bytes"] == 455 * 2**20
    assert row["flops_per_step"] == 280_300_000_000
    assert row["trainable_params"] == 61_440
    assert (row["ok"], row["failed"], row["total"], row["seeds"]) == (1, 0, 1, [3])


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ConfigError, match="a table row has 1 cells, but there are 2 columns"):
        Table(caption="", titles=("a", "b"), cells=(("1",),), notes=(), rows=())


def test_summary_of_a_run_with_a_seam(make: Make) -> None:
    text = run_summary(make("bart", k=20, metrics={"accuracy": 0.8922, "loss": 0.31}))
    assert text.startswith("weightlora (recommended) on sst2, bart, seed 0: ok\n  accuracy: 0.8922 (loss 0.3100)\n")
    assert "adapters kept: 20 of 96: encoder." in text
    assert "and 8 more" in text
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "warmup final change",
        "steps 100 300",
        "micro-batch 8 x 2 8 x 1",
        "trainable parameters 442.4 k 61.4 k 7.20x less",
        "kept activations 1545.0 MiB 455.0 MiB 3.40x less",
        "FLOPs per step 434.7 GFLOP 280.3 GFLOP 1.55x less",
        "time per step 400.0 ms 200.0 ms 2.00x less",
        "warmup took 100 of 400 steps and 40% of the time (40 s);"
        " it sets the run's peak of 1545.0 MiB kept activations",
    } <= rows
    assert max(len(line) for line in text.splitlines()) <= 120


def test_summary_of_other_runs(make: Make) -> None:
    plain = run_summary(run(make, "lora", 0, 0.9))
    assert "change" not in plain
    assert "took" not in plain
    assert "adapters" not in run_summary(full(make, 0, 0.9))
    broken = run_summary(failed(make, "top", 0, "two\nlines"))
    assert "seed 0: failed\n  error: two lines\n" in broken
    held = make("bert", k=2, metrics={"accuracy": 0.5}, scored_on={"split": "train", "rows": 9, "train_rows": 81})
    assert "  accuracy: 0.5000, on 9 held-out rows; 81 training rows\n" in run_summary(held)
    bare = run_summary(make("bert", k=2, adapters=()))
    assert re.search(r"adapters kept: 2 of 36: \S+\.\S+, \S+\.\S+\n", bare)


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (None, BYTES, "-"),
        (0, BYTES, "0 B"),
        (999, COUNT, "999"),
        (1545 * 2**20, BYTES, "1545.0 MiB"),
        (16 * 2**30, BYTES, "16.0 GiB"),
        (434.7e9, FLOPS, "434.7 GFLOP"),
        (67_000_000, COUNT, "67.0 M"),
        (0.0305, SECONDS, "30.5 ms"),
        (2.5, SECONDS, "2.50 s"),
        (math.nan, SECONDS, "nan ms"),
    ],
)
def test_human_units(value: float | None, scale: Any, text: str) -> None:
    assert human(value, scale) == text


@given(st.lists(st.floats(1, 1e13), min_size=1, max_size=6), st.sampled_from([BYTES, FLOPS, COUNT, SECONDS]))
def test_a_column_shows_every_number_to_three_digits(values: list[float], scale: Any) -> None:
    """However far apart the numbers are, none is rounded away."""
    unit = Unit.fit(values, scale)
    for value in values:
        assert float(unit.cell(value)) * unit.factor == pytest.approx(value, rel=0.006)


def test_ratios_are_symmetric() -> None:
    assert ratio(3.0, 1.0) == "3.00x less"
    assert ratio(1.0, 3.0) == "3.00x more"
    assert ratio(0, 1) == ratio(1, None) == "-"

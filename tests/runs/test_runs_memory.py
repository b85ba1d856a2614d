"""``--memory`` and ``--step-time``: from the command line into the record, and refused before anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.runs.commands import TINY, read, weightlora

FLAGS = (*TINY, "--task", "sst2", "--max-steps", "6", "--select-after", "3", "--learning-rate", "1e-2")


def train(data: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert weightlora("train", *FLAGS, "--data-dir", data, *flags, "--out", out) == 0
    record: dict[str, Any] = read(out / "record.json")
    return record


def smallest(data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> int:
    assert weightlora("train", *FLAGS, "--data-dir", data, "--memory", "1KiB", "--out", out) == 2
    said = capsys.readouterr().err
    assert not out.exists()
    found = re.search(r"memory=1KiB is too little: .* takes (\d+) bytes \(.*\) at a micro-batch of 1", said)
    assert found, said
    return int(found[1])


def test_a_tighter_memory_changes_the_run_and_is_kept(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    least = smallest(small_data, tmp_path / "no", capsys)
    seen = []
    for more in (64 * 2**20, 0):
        record = train(small_data, tmp_path / str(more), "--memory", str(least + more))
        placement = record["placement"]
        assert max(placement["total"], placement["warmup_total"]) <= placement["budget"] == least + more
        assert record["k"] is None
        assert "of memory at a micro-batch of the" in record["why"]
        chosen = read(tmp_path / str(more) / "selection.json")
        assert chosen["placement"] == placement
        assert [phase["micro_batch"] for phase in record["phases"]] == [
            placement["warmup_micro_batch"], placement["micro_batch"],
        ]  # fmt: skip
        seen.append((placement["warmup_micro_batch"], len(record["kept"]), placement["depth"]))
    assert seen[0][0] == 8
    assert seen[1][0] == 1
    assert seen[0] != seen[1]


def test_a_share_of_the_operations(small_data: Path, tmp_path: Path) -> None:
    record = train(small_data, tmp_path / "run", "--method", "weightlora+", "--step-time", "0.8x")
    assert record["placement"]["kind"] == "step_time"
    assert record["placement"]["total"] <= record["placement"]["budget"] <= 0.8 * record["placement"]["whole"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory", "1GiB", "--k", "3"), "k and memory both say how many adapters are kept"),
        (("--memory", "a lot"), "'a lot' is not a number of bytes"),
        (("--step-time", "60%"), "'60%' is not a share"),
        (("--method", "weightlora", "--memory", "1GiB", "--params", "9k"), "params and memory both say"),
        (("--step-time", "0.01x"), "step_time=0.01x is too little"),
        (("--method", "random", "--memory", "1GiB"), "random has no setting 'memory'"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    flags: tuple[str, ...], message: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = FLAGS if "random" not in flags else [w for w in FLAGS if w not in ("--select-after", "3")]
    assert weightlora("train", *words, "--data-dir", small_data, *flags, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

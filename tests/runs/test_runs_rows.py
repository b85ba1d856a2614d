"""Which rows choose settings and which are reported: never the same ones, and said where they might be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.runs.commands import read_rows, spec, write_rows

from weightlora.errors import ConfigError, DataError
from weightlora.runs.build import scored_on, tell_scored_on
from weightlora.runs.dry import check
from weightlora.runs.record import Record
from weightlora.runs.run import refused
from weightlora.runs.spec import RunSpec
from weightlora.study.grid import Cell, Grid, on_training_rows
from weightlora.study.jobs import Job, check_apart
from weightlora.study.sweep import sweep
from weightlora.tasks.load import read_task as read
from weightlora.tasks.task import Task

PAIRS = [{"prompt": f"the color {n} is", "completion": f" blue {n}"} for n in range(40)]


def read_task(described: RunSpec) -> Task:
    return read(described.task, described.model.name)


LABELLED = [{"text": f"row {n}", "label": "yes" if n % 2 else "no"} for n in range(40)]


def identities(rows: Any, columns: Sequence[str]) -> set[str]:
    """What a row says, hashed; found without the code that is tested."""
    return {hashlib.sha256(json.dumps([row[name] for name in columns]).encode()).hexdigest() for row in rows}


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.NDJSON"])
def test_a_file_without_validation_rows_is_known_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, PAIRS)
    config = spec(task=str(path))
    check(config)
    task = read_task(config)
    held_out = {"split": "train", "split_seed": 0, "rows": 4, "train_rows": 36}
    assert scored_on(config, task) == held_out
    with pytest.raises(ConfigError, match="without --validation-file, settings would be chosen on the rows that are"):
        on_training_rows(config)
    with pytest.raises(ConfigError, match="without --validation-file"):
        Grid(cells=(Cell(row="lora", spec=config),), learning_rates=(1e-3, 1e-2))
    judged = config.but(validation_file=str(write_rows(tmp_path / f"v_{name}", PAIRS[:3])))
    whole = {"split": "validation", "rows": 3, "train_rows": 40, "also_trained_on": 3}
    assert scored_on(judged, read_task(judged)) == whole


def test_a_table_is_no_task_by_its_path(tmp_path: Path) -> None:
    for name in ("a.csv", "b.TSV", "c.parquet"):
        with pytest.raises(DataError, match=rf"is a file; .* --task files --train-file \S*{name} --label-column"):
            spec(task=str(tmp_path / name), text_column="review")
    with pytest.raises(DataError, match=r"unknown task '\S+'; a folder of tasks goes with --data-dir"):
        check(spec(task=str(tmp_path)))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}] * 20)
    with pytest.raises(DataError, match=r"no column 'prompt'; .* texts with labels go with --task files --train-file"):
        read_task(spec(task=str(rows)))


@pytest.fixture
def configs(small_data: Path, data_dir: Path, tmp_path: Path) -> dict[str, RunSpec]:
    """One configuration of every kind of task that can be tuned."""
    cut = tmp_path / "cut"
    for task in ("squad", "xsum", "gsm8k"):
        (cut / task).mkdir(parents=True)
        for split in ("train", "test" if task == "gsm8k" else "validation"):
            with (data_dir / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
                (cut / task / f"{split}.jsonl").write_text("".join(next(lines) for _ in range(40)), encoding="utf-8")
    tables = [
        write_rows(tmp_path / name, LABELLED[part]) for name, part in (("t.json", slice(30)), ("v.json", slice(30, 40)))
    ]
    chats = [
        write_rows(tmp_path / name, PAIRS[part]) for name, part in (("a.JSON", slice(30)), ("b.json", slice(30, 40)))
    ]
    return {
        **{task: spec(task=task, data_dir=str(small_data)) for task in ("sst2", "mrpc", "stsb")},
        **{task: spec(task=task, data_dir=str(cut)) for task in ("squad", "xsum", "gsm8k")},
        "files": spec(task="files", train_file=str(tables[0]), validation_file=str(tables[1])),
        "own": spec(task=str(chats[0]), validation_file=str(chats[1])),
    }


def test_rows_that_choose_are_never_rows_that_are_reported(
    configs: dict[str, RunSpec], caplog: pytest.LogCaptureFixture
) -> None:
    """Not but for pairs that the data set itself has in both splits, as STS-B does: those are counted."""
    for name, config in configs.items():
        reported, tuned = read_task(config), read_task(on_training_rows(config.but(holdout=0.2)))
        known = reported.inputs if name != "own" else ("prompt",)
        trained, chosen = (identities(rows, known) for rows in (reported.train, tuned.validation))
        both = [row for row in reported.validation if identities([row], known) & trained]
        assert len(reported.validation) > 0, name
        assert chosen <= trained, name
        assert len(identities(reported.validation, known) & chosen) <= len(both) <= 2 * (name == "stsb"), name
        caplog.clear()
        check_apart([config])
        told = f"{len(both)} of {len(reported.validation)} reported rows are training rows too"
        assert (told in caplog.text) is bool(both), name


def test_choosing_does_not_open_the_reported_file(configs: dict[str, RunSpec]) -> None:
    for name in ("files", "own"):
        before = read_task(on_training_rows(configs[name].but(holdout=0.2)))
        Path(str(configs[name].task.validation_file)).unlink()
        after = read_task(on_training_rows(configs[name].but(holdout=0.2)))
        assert list(before.validation) == list(after.validation)


def other_names(path: Path) -> list[Path]:
    """The same rows once more: the file itself, a link to it, a copy, a copy in another order and format."""
    link, copy, turned = (path.with_name(name) for name in ("link.jsonl", "copy.jsonl", "turned.json"))
    os.symlink(path, link)
    shutil.copy(path, copy)
    write_rows(turned, [dict(reversed(row.items())) for row in reversed(read_rows(path))])
    return [path, link, copy, turned]


@pytest.mark.parametrize("kind", ["files", "own", "folder"])
def test_reported_rows_that_are_training_rows_are_found_by_what_they_say(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"files": LABELLED, "own": PAIRS}.get(kind, [{"sentence": f"row {n}", "label": n % 2} for n in range(40)])
    (tmp_path / "sst2").mkdir()
    path = write_rows(tmp_path / "sst2" / "train.jsonl", rows)

    def config(judge: Path) -> RunSpec:
        if kind == "folder":
            judge.rename(tmp_path / "sst2" / "validation.jsonl")
            return spec(task="sst2", data_dir=str(tmp_path))
        own = {"task": "files", "train_file": str(path)} if kind == "files" else {"task": str(path)}
        return spec(**own, validation_file=str(judge))  # type: ignore[arg-type]

    for judge in other_names(path)[1 if kind == "folder" else 0 :]:
        same = config(judge)
        with pytest.raises(ConfigError, match="40 of 40 reported rows are training rows, on which settings would be"):
            check_apart([same])
        assert scored_on(same, read_task(same))["also_trained_on"] == 40
    new = [{key: f"{value}?" if isinstance(value, str) and key != "label" else value for key, value in row.items()}
           for row in rows]  # fmt: skip
    some = config(write_rows(tmp_path / "some.jsonl", new[:9] + rows[:3]))
    check_apart([some, some.but(method="lora", seed=3)])
    assert caplog.text.count("3 of 12 reported rows are training rows too, and settings may be chosen on them") == 1
    tell_scored_on(some, where := scored_on(some, read_task(some)))
    assert where == {"split": "validation", "rows": 12, "train_rows": 40, "also_trained_on": 3}
    assert "3 of 12 rows that judge the run have the texts of training rows" in caplog.text
    with pytest.raises(ConfigError, match="40 of 40"):  # also where a run would draw few of them to train on
        check_apart([config(other_names(write_rows(tmp_path / "again.jsonl", rows))[2]).but(max_train_samples=2)])


def test_rows_that_occur_twice_may_be_held_out_once_and_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", LABELLED * 2)
    config = spec(task="files", train_file=str(path))
    task = read_task(config)
    inside = sum(row["text"] in set(task.train["text"]) for row in task.validation)
    assert inside > 0
    assert scored_on(config, task)["also_trained_on"] == inside


def test_the_best_checkpoint_is_said_to_be_chosen_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write_rows(tmp_path / "t.json", LABELLED))
    training = {"load_best_model_at_end": True}
    config = spec(task="files", train_file=path, training=training)
    tell_scored_on(config, where := scored_on(config, read_task(config)))
    assert where == {"split": "train", "split_seed": 0, "rows": 4, "train_rows": 36, "checkpoint": "best"}
    assert "the best checkpoint is chosen on the rows that judge the run" in caplog.text


class Pretended:
    """Runs nothing; every job is done, and the middle rate is the best."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job], **_: Any) -> list[Record]:
        self.jobs += jobs
        scores = [1 - abs(job.spec.training.arguments["learning_rate"] - 1e-3) for job in jobs]
        blanks = [refused(job.spec, "", "accuracy") for job in jobs]
        return [replace(blank, status="ok", error=None, metrics={"accuracy": score},
                        trainable_params={"warmup": 1, "final": 1})
                for blank, score in zip(blanks, scores, strict=True)]  # fmt: skip

    def rows(self, *, tuning: bool) -> list[Task]:
        return [read_task(job.spec) for job in self.jobs if ("tune" in job.folder.parts) is tuning]


@pytest.mark.parametrize("holdout", [None, 0.3])
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_commands_that_choose_report_other_rows(
    command: str, holdout: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the user says which share is held out: on that share settings are chosen, and nothing is reported."""
    train, judge = (
        write_rows(tmp_path / name, LABELLED[part]) for name, part in (("t.json", slice(30)), ("v.json", slice(30, 40)))
    )
    config = spec(task="files", train_file=str(train), validation_file=str(judge), model="bert-tiny-shape",
                       method="lora", holdout=holdout, training={"max_steps": 2})  # fmt: skip
    pretended = Pretended()
    monkeypatch.setattr("weightlora.study.sweep.execute", pretended)

    def run(name: str) -> None:
        rates: dict[str, Any] = {"tune": (0.3, 1)} if command == "compare" else {"learning_rates": (3e-4, 1e-3)}
        (tmp_path / name).mkdir()
        sweep(Grid(cells=(Cell(row="lora", spec=config),), seeds=(0,), **rates), tmp_path / name)

    run("one")
    tuned, reported = pretended.rows(tuning=True), pretended.rows(tuning=False)
    assert [len(task.validation) for task in tuned] == [round(30 * (holdout or 0.1))] * 2
    (final,) = reported
    assert list(final.validation["text"]) == [row["text"] for row in LABELLED[30:]]
    assert len(final.train) == 30
    assert all(not set(task.validation["text"]) & set(final.validation["text"]) for task in tuned)
    shutil.copy(train, judge)
    with pytest.raises(ConfigError, match="30 of 30 reported rows are training rows"):
        run("two")

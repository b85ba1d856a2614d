"""What the user did wrong is said in one line, with exit code 2, and leaves no trace on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, tree, weightlora, write_rows

Words = list[object]
STEPS = 4


class Desk:
    """A folder with a finished run, an unfinished one and some bad files; what a command leaves there can be seen."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def path(self, name: str) -> Path:
        return self.folder / name

    def train(self, *words: object, out: str = "out") -> Words:
        task = ["--task", "sst2", "--data-dir", self.data, *TINY, "--max-steps", STEPS, "--save-steps", 2]
        return ["train", *task, *words, "--out", self.path(out)]

    def files(self, *words: object) -> Words:
        task = ["--task", "files", *TINY, "--max-steps", STEPS]
        return ["train", *task, *words, "--out", self.path("out")]


@pytest.fixture(scope="module")
def desk(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    made = Desk(tmp_path_factory.mktemp("desk"), small_data)
    flags = ("--k", "3", "--select-after", "2")
    assert weightlora(*made.train(*flags, out="finished")) == 0
    assert weightlora(*made.train("--method", "full", out="full")) == 0
    for name, words in {
        "unfinished": (),
        "other_model": ("--targets", "attention"),
        "other_method": ("--k", "2"),
    }.items():
        assert weightlora(*made.train(*flags, *words, out=name)) == 0
        # As a kill after the last checkpoint leaves it.
        shutil.rmtree(made.path(name) / "adapter")
        record = read(made.path(name) / "record.json") | {"status": "running"}
        (made.path(name) / "record.json").write_text(json.dumps(record), encoding="utf-8")
    for name in ("other_model", "other_method"):
        swapped = made.path(f"with_checkpoint_of_{name}")
        shutil.copytree(made.path("unfinished"), swapped)
        shutil.rmtree(swapped / "checkpoints")
        shutil.copytree(made.path(name) / "checkpoints", swapped / "checkpoints")
    shutil.copytree(made.path("unfinished"), made.path("bad_json"))
    (made.path("bad_json") / "config.json").write_text('{"task": "sst2",', encoding="utf-8")
    shutil.copytree(made.path("unfinished"), made.path("bad_type"))
    config = read(made.path("bad_type") / "config.json")
    (made.path("bad_type") / "config.json").write_text(json.dumps(config | {"r": "eight"}), encoding="utf-8")
    shutil.copytree(made.path("unfinished"), made.path("bad_record"))
    (made.path("bad_record") / "record.json").write_text("[]", encoding="utf-8")
    write_bad_files(made)
    return made


def write_bad_files(desk: Desk) -> None:
    rows = [{"text": f"a line of text {i}", "label": "yes" if i % 2 else "no"} for i in range(20)]
    write_rows(desk.path("good.jsonl"), rows)
    write_rows(desk.path("unseen.jsonl"), [*rows[:3], {"text": "fine", "label": "maybe"}])
    desk.path("empty.jsonl").touch()
    good = desk.path("good.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    desk.path("broken.jsonl").write_text("".join([*good[:6], '{"text": "cut o\n', *good[6:]]), encoding="utf-8")
    desk.path("a_file").write_text("not a folder", encoding="utf-8")
    desk.path("holiday").mkdir()
    desk.path("holiday/photo.jpg").write_bytes(b"dear to somebody")
    desk.path("no.yaml").write_text("task: [sst2\nk: 3\n", encoding="utf-8")
    desk.path("list.yaml").write_text("- task\n- sst2\n", encoding="utf-8")
    desk.path("adapter").mkdir()
    desk.path("adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    desk.path("typo.yaml").write_text("tsak: sst2\n", encoding="utf-8")


# name: (the command, what its line must say)
Case = tuple[Callable[[Desk], Words], tuple[str, ...]]
CASES: dict[str, Case] = {
    "unknown task": (lambda d: ["train", "--task", "sst3", "--out", d.path("out")], ("'sst3'", "sst2")),
    "unknown method": (lambda d: d.train("--method", "wieghtlora"), ("'wieghtlora'", "did you mean 'weightlora'")),
    "unknown preset": (lambda d: d.train("--preset", "papre"), ("'papre'", "paper")),
    "unknown model": (lambda d: d.train("--model", "bert-tiny-shap"), ("'bert-tiny-shap'", "bert-tiny-shape")),
    "no such model folder": (lambda d: d.train("--model", d.path("nowhere")), ("no such folder",)),
    "a file for a model": (lambda d: d.train("--model", d.path("good.jsonl")), ("is a file", "--train-file")),
    "an adapter for a model": (lambda d: d.train("--model", d.path("adapter")), ("holds an adapter",)),
    "a run for a model": (lambda d: d.train("--model", d.path("finished")), ("weightlora export",)),
    "a recipe for a method": (lambda d: d.train("--method", "my.yaml"), ("weightlora train my.yaml",)),
    "rows for a recipe": (lambda d: ["train", d.path("good.jsonl")], ("is no recipe", "--train-file")),
    "steps negative": (lambda d: d.train("--max-steps", "-5"), ("max_steps=-5",)),
    "no such place for losses": (lambda d: d.train("--report-to", "nowhere"), ("report_to='nowhere'", "none")),
    "unknown score": (lambda d: d.train("--score", "luck"), ("'luck'", "credit")),
    "unknown growth": (lambda d: d.train("--method", "weightlora+", "--growth", "tall"), ("'tall'", "qr")),
    "a setting of another method": (lambda d: d.train("--method", "top", "--gate-lr", "1"), ("gate_lr", "top")),
    "module pattern": (lambda d: d.train("--targets", "query,quary"), ("'quary'", "query")),
    "k zero": (lambda d: d.train("--k", "0"), ("k=0 ", "0.25")),
    "k above n": (lambda d: d.train("--k", "13"), ("k=13 ", "12")),
    "k negative": (lambda d: d.train("--k", "-2"), ("k=-2 ",)),
    "k no number": (lambda d: d.train("--k", "many"), ("k='many'",)),
    "k one and a half": (lambda d: d.train("--k", "1.5"), ("k=1.5 ",)),
    "T too long": (lambda d: d.train("--select-after", STEPS), (f"select_after={STEPS} ", f"at most {STEPS - 1}")),
    "T zero": (lambda d: d.train("--select-after", "0"), ("select_after=0 ",)),
    "T of the official preset": (lambda d: d.train("--method", "weightlora+", "--preset", "official"), ("20", "4")),
    "batches of gradient": (lambda d: d.train("--method", "gradient"), ("8", "4")),
    "rank zero": (lambda d: d.train("--r", "0"), ("r=0 ",)),
    "rate not finite": (lambda d: d.train("--learning-rate", "nan"), ("learning_rate=nan",)),
    "rate negative": (lambda d: d.train("--learning-rate", "-1"), ("learning_rate=-1",)),
    "batch of none": (lambda d: d.train("--per-device-train-batch-size", "0"), ("per_device_train_batch_size=0",)),
    "no steps": (lambda d: d.train("--max-steps", "0"), ("max-steps",)),
    "micro-batch": (lambda d: d.train("--micro-batch", "3"), ("micro_batch=3", "8")),
    "no room for text": (lambda d: d.train("--max-length", "2"), ("max_length=2",)),
    "sample of none": (lambda d: d.train("--max-train-samples", "0"), ("max_train_samples=0",)),
    "what Transformers refuses": (lambda d: d.train("--load-best-model-at-end"), ("load_best_model_at_end", "eval")),
    "output_dir": (lambda d: d.train("--output_dir", "elsewhere"), ("output_dir", "--out")),
    "text column": (
        lambda d: d.files("--train-file", d.path("good.jsonl"), "--text-column", "txet"), ("'txet'", "text", "label"),
    ),
    "label column": (
        lambda d: d.files("--train-file", d.path("good.jsonl"), "--label-column", "y"), ("'y'", "text", "label"),
    ),
    "label unseen": (
        lambda d: d.files("--train-file", d.path("good.jsonl"), "--validation-file", d.path("unseen.jsonl")),
        ("unseen.jsonl:4", "'maybe'"),
    ),
    "empty file": (lambda d: d.files("--train-file", d.path("empty.jsonl")), ("empty.jsonl", "empty")),
    "broken line": (lambda d: d.files("--train-file", d.path("broken.jsonl")), ("broken.jsonl:7", "broken JSON")),
    "no such file": (lambda d: d.files("--train-file", d.path("nowhere.csv")), ("nowhere.csv",)),
    "no training file": (lambda d: d.files(), ("train_file",)),
    "no such data folder": (lambda d: d.train("--data-dir", d.path("nowhere")), ("nowhere",)),
    "out is a file": (lambda d: d.train(out="a_file"), ("a_file", "is a file")),
    "out is a file, overwrite": (lambda d: d.train("--overwrite", out="a_file"), ("a_file", "is a file")),
    "out holds a finished run": (lambda d: d.train(out="finished"), ("finished run", "--overwrite")),
    "out holds an unfinished run": (lambda d: d.train(out="unfinished"), ("unfinished run", "weightlora resume")),
    "out holds something else": (lambda d: d.train(out="holiday"), ("not empty",)),
    "overwrite a strange folder": (lambda d: d.train("--overwrite", out="holiday"), ("not empty",)),
    "overwrite, but the task is wrong": (
        lambda d: [*d.train("--overwrite", out="finished"), "--task", "sst3"], ("'sst3'",),
    ),
    "json is a folder": (lambda d: d.train("--json", d.folder), ("is a folder", "--json")),
    "json below a file": (lambda d: d.train("--json", d.path("a_file") / "a.json"), ("a_file is a file", "--json")),
    "no recipe": (lambda d: ["train", d.path("nowhere.yaml"), "--out", d.path("out")], ("nowhere.yaml", "No such")),
    "recipe is no YAML": (lambda d: ["train", d.path("no.yaml"), "--out", d.path("out")], ("no.yaml", "not YAML")),
    "typo in a recipe": (
        lambda d: ["train", d.path("typo.yaml"), "--out", d.path("out")], ("'tsak'", "did you mean task?"),
    ),
    "recipe is a list": (lambda d: ["train", d.path("list.yaml"), "--out", d.path("out")], ("list.yaml", "map flags")),
    "resume nothing": (lambda d: ["resume", d.path("nowhere")], ("nowhere", "not a run directory")),
    "resume a folder without a run": (lambda d: ["resume", d.path("holiday")], ("holiday", "not a run directory")),
    "resume a finished run": (lambda d: ["resume", d.path("finished")], ("finished run", "nothing to resume")),
    "resume with a damaged config": (lambda d: ["resume", d.path("bad_json")], ("config.json", "damaged")),
    "resume with a nonsense config": (lambda d: ["resume", d.path("bad_type")], ("config.json", "damaged", "'eight'")),
    "resume with a damaged record": (lambda d: ["resume", d.path("bad_record")], ("record.json",)),
    "checkpoint of another model": (
        lambda d: ["resume", d.path("with_checkpoint_of_other_model")], ("another model", "6 adapters", "12"),
    ),
    "checkpoint of another method": (
        lambda d: ["resume", d.path("with_checkpoint_of_other_method")], ("the same method",),
    ),
    "export nothing": (lambda d: ["export", d.path("nowhere")], ("nowhere", "not a run directory")),
    "export an unfinished run": (lambda d: ["export", d.path("unfinished")], ("no finished run", "weightlora resume")),
    "export of full fine-tuning": (lambda d: ["export", d.path("full")], ("no adapter", "'full'")),
    "export over a folder": (lambda d: ["export", d.path("finished"), "--out", d.path("holiday")], ("not empty",)),
    "export over a file": (lambda d: ["export", d.path("finished"), "--out", d.path("a_file")], ("is a file",)),
    "select with full": (
        lambda d: ["select", *d.train()[1:], "--method", "full"], ("'full' selects nothing", "weightlora"),
    ),
    "select over a run": (lambda d: ["select", *d.train(out="finished")[1:]], ("finished run",)),
    "compare: unknown method": (lambda d: ["compare", *d.train()[1:], "--methods", "lora,lroa"], ("'lroa'",)),
    "compare: unknown preset": (lambda d: ["compare", *d.train()[1:], "--methods", "lora:papre"], ("'papre'",)),
    "compare: seeds": (lambda d: ["compare", *d.train()[1:], "--seeds", "0,one"], ("'one'",)),
    "compare: rates for factors": (
        lambda d: ["compare", *d.train()[1:], "--tune", "3e-4,1e-3"],
        ("tune=0.0003,0.001 must be multiples of each method's own learning rate", "learning_rates, such as 3e-4,1e-3"),
    ),
    "compare: rates": (lambda d: ["compare", *d.train()[1:], "--tune", "0,1"], ("tune=0",)),
    "compare: no method can run": (
        lambda d: ["compare", *d.train()[1:], "--methods", "gradient"], ("gradient: ", "8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gets_one_line_and_writes_nothing(desk: Desk, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, parts = CASES[name]
    words = make(desk)
    before = tree(desk.folder)
    assert weightlora(*words) == 2
    assert tree(desk.folder) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"weightlora {words[0]}: error: ")
    assert all(part in err for part in parts), err


USAGE: dict[str, Case] = {
    "unknown flag": (lambda d: d.train("--kk", "3"), ("--kk",)),
    "stray word": (lambda d: d.train("and", "more"), ("and more",)),
    "trainer flag": (lambda d: d.train("--learning-rate", "fast"), ("'fast'",)),
    "scheduler": (lambda d: d.train("--lr_scheduler_type", "liner"), ("'liner'", "linear")),
    "unknown profile": (lambda d: ["export", d.path("finished"), "--profile", "tiny"], ("'tiny'", "portable")),
    "no run": (lambda d: ["resume"], ("RUN",)),
    "flag of another command": (lambda d: ["resume", d.path("unfinished"), "--k", "3"], ("--k 3",)),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_usage_error_shows_the_usage_too(desk: Desk, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, parts = USAGE[name]
    words = make(desk)
    before = tree(desk.folder)
    assert weightlora(*words) == 2
    assert tree(desk.folder) == before
    out, err = capsys.readouterr()
    usage, line = err.strip().split("\n")
    assert out == ""
    assert usage.startswith(f"usage: weightlora {words[0]} ")
    assert line.startswith(f"weightlora {words[0]}: error: ")
    assert all(part in line for part in parts), err


@pytest.mark.parametrize("words", [["trian"], ["--kk=3"], ["-x"]])
def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert weightlora(*words) == 2
    usage, line = capsys.readouterr().err.strip().split("\n")
    assert usage.startswith("usage: weightlora ")
    assert line.startswith("weightlora: error: ")
    assert words[0] in line


def test_a_dead_process_s_temporary_file_does_not_block_the_folder(desk: Desk) -> None:
    """A kill before the configuration was whole leaves one; the same command starts the run then."""
    desk.path("young").mkdir()
    desk.path("young/.config.json.k3v_x9a0").write_text('{"ta', encoding="utf-8")
    assert weightlora(*desk.train("--method", "top", out="young")) == 0
    assert [path.name for path in desk.path("young").glob(".*")] == []


def test_overwrite_replaces_a_run_and_a_selection(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(desk.path("finished"), desk.path("old"))
    assert weightlora(*desk.train("--method", "top", "--k", "2", "--overwrite", out="old")) == 0
    assert read(desk.path("old/record.json"))["method"] == "top"
    assert weightlora("select", *desk.train("--method", "random", "--k", "2", "--overwrite", out="old")[1:]) == 0
    assert not desk.path("old/record.json").exists()
    capsys.readouterr()
    assert weightlora(*desk.train(out="old")) == 2
    assert "already holds a selection" in capsys.readouterr().err
    assert weightlora(*desk.train("--method", "top", "--k", "2", "--overwrite", out="old")) == 0
    assert read(desk.path("old/record.json"))["status"] == "ok"


def test_a_failed_run_can_be_resumed_and_overwritten(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--method", "lora", "--learning-rate", "1e30")
    assert weightlora(*desk.train(*words, out="failed")) == 1
    assert read(desk.path("failed/record.json"))["status"] == "failed"
    assert weightlora("resume", desk.path("failed")) == 1
    capsys.readouterr()
    assert weightlora(*desk.train(*words, out="failed")) == 2
    assert "unfinished run" in capsys.readouterr().err
    assert weightlora(*desk.train("--method", "lora", "--overwrite", out="failed")) == 0
    assert not desk.path("failed/error.txt").exists()

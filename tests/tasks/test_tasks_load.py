"""Tasks by name: sizes, labels, subsets and hold-outs that depend on the seed alone."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import TASKS, Classification, Task, glue, load_task
from weightlora.tasks.docstrings import TOPICS, clean, load_docstrings
from weightlora.tasks.examples import Examples, hold_out

SIZES = {
    "cola": (8551, 1043, 2, ("sentence",), "matthews_correlation"),
    "sst2": (67349, 872, 2, ("sentence",), "accuracy"),
    "mrpc": (3668, 408, 2, ("sentence1", "sentence2"), "acc_f1"),
    "stsb": (5749, 1500, 1, ("sentence1", "sentence2"), "corr"),
    "mnli": (10471, 9815, 3, ("premise", "hypothesis"), "accuracy_matched"),
    "qqp": (12000, 5000, 2, ("question1", "question2"), "acc_f1"),
}


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("name", SIZES)
def test_glue_from_a_folder(name: str, data_dir: Path) -> None:
    task = load_task(name, data_dir=data_dir)
    train, validation, classes, columns, metric = SIZES[name]
    assert (len(task.train), len(task.validation)) == (train, validation)
    assert (task.num_labels, task.text_columns, task.metric) == (classes, columns, metric)
    file = "validation_matched.jsonl" if name == "mnli" else "validation.jsonl"
    expected = [{key: row[key] for key in (*columns, "label")} for row in rows(data_dir / name / file)]
    assert list(task.validation) == expected
    assert type(task.train[0]["label"]) is (float if task.is_regression else int)


def test_glue_label_names_are_in_the_hubs_order(data_dir: Path) -> None:
    mnli = load_task("mnli", data_dir=data_dir, max_train_samples=10)
    assert mnli.labels == ("entailment", "neutral", "contradiction")
    assert load_task("stsb", data_dir=data_dir, max_train_samples=10).labels is None


@pytest.mark.parametrize(("name", "columns"), [("rte", ("sentence1", "sentence2")), ("qnli", ("question", "sentence"))])
def test_the_other_two_glue_tasks_from_a_folder(name: str, columns: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    lines = "".join(json.dumps({columns[0]: "a", columns[1]: f"b{i}", "label": i % 2}) + "\n" for i in range(6))
    for split in ("train", "validation"):
        (tmp_path / name / f"{split}.jsonl").write_text(lines)
    task = load_task(name, data_dir=tmp_path)
    assert task.labels == ("entailment", "not_entailment")
    assert (task.text_columns, task.metric, len(task.train), len(task.validation)) == (columns, "accuracy", 6, 6)


def test_a_folder_without_the_task_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder for task 'rte' in data_dir \(it holds no folder\); add rte/"):
        load_task("rte", data_dir=tmp_path)
    (tmp_path / "mnli").mkdir()
    with pytest.raises(DataError, match=r"it holds mnli\); add rte/train.jsonl and rte/validation.jsonl"):
        load_task("rte", data_dir=tmp_path)
    (tmp_path / "mnli" / "train.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 0}\n')
    with pytest.raises(DataError, match=r"validation_matched\.jsonl: no such file"):
        load_task("mnli", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"sentence": "a", "label": -1}', ":1: the label -1 is not one of 0 = unacceptable, 1 = acceptable"),
        ('{"sentence": "a", "label": true}', ":1: the label True is not one of"),
        ('{"text": "a", "label": 1}', ":1: no column 'sentence'; .* task 'cola' needs the columns sentence, label"),
    ],
)
def test_a_glue_folder_with_the_wrong_rows(tmp_path: Path, row: str, problem: str) -> None:
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=problem):
        load_task("cola", data_dir=tmp_path)


def test_the_hub_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        DataError, match=r"^task 'rte' cannot be read from the hub's nyu-mll/glue .*; check the network"
    ):
        load_task("rte")


def test_the_hubs_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with the hub repository's layout, read by the same call."""
    splits = ("train", "validation_matched", "validation_mismatched")
    files = "".join(f"  - split: {split}\n    path: mnli/{split}.jsonl\n" for split in splits)
    (tmp_path / "hub" / "mnli").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- config_name: mnli\n  data_files:\n{files}---\n")
    for number, split in enumerate(splits):
        lines = [{"premise": f"{split} {i}", "hypothesis": "h", "label": i % 3, "idx": i} for i in range(3 + number)]
        path = tmp_path / "hub" / "mnli" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(glue, "HUB_NAME", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task("mnli")
    assert task.train["premise"][:] == ["train 0", "train 1", "train 2"]
    assert task.validation["premise"][:] == [f"validation_matched {i}" for i in range(4)]
    assert list(task.validation["label"]) == [0, 1, 2, 0]
    assert task.train.column_names == ["premise", "hypothesis", "label"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SST-2", "did you mean 'sst2'"), ("docstring", "did you mean 'docstrings'"), ("xyzzy", "the tasks")],
)
def test_an_unknown_task(name: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"unknown task '{name}'; {hint}") as caught:
        load_task(name)
    assert ", ".join(TASKS) in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [{"max_train_samples": 0}, {"max_eval_samples": -1}, {"holdout": 0.0}, {"holdout": 1.0}, {"split_seed": -1}],
)
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} is not allowed; use "):
        load_task("docstrings", **setting)  # type: ignore[arg-type]


def test_a_folder_that_a_task_does_not_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_task("docstrings", data_dir=str(tmp_path), max_train_samples=20, max_eval_samples=5)
    assert caplog.messages == [f"data_dir={tmp_path} has no effect: task 'docstrings' has its rows elsewhere"]


def content(task: Task) -> tuple[list[str], list[str]]:
    return list(task.train["sentence"]), list(task.validation["sentence"])


def test_subsets_depend_on_the_seed_alone(data_dir: Path) -> None:
    def draw(seed: int, train: int = 50) -> tuple[list[str], list[str]]:
        return content(
            load_task("cola", data_dir=data_dir, max_train_samples=train, max_eval_samples=30, split_seed=seed)
        )

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = draw(0)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(5)
    assert draw(0) == first
    assert draw(1) != first
    larger = draw(0, train=60)
    assert larger[0][:50] == first[0]
    whole = list(load_task("cola", data_dir=data_dir).train["sentence"])
    assert [len(part) for part in first] == [50, 30]
    assert first[0] != [text for text in whole if text in set(first[0])][:50]  # shuffled, not in file order
    assert set(first[0]) <= set(whole)


def test_holdout_cuts_train_by_class_and_never_reads_validation(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_bytes((data_dir / "cola" / "train.jsonl").read_bytes())
    task = load_task("cola", data_dir=tmp_path, holdout=0.1, split_seed=3)
    assert (len(task.train), len(task.validation)) == (7696, 855)
    assert Counter(task.validation["label"]) == {1: 602, 0: 253}  # 10 % of 6023 and of 2528
    whole = [(row["sentence"], row["label"]) for row in rows(data_dir / "cola" / "train.jsonl")]
    parts = [(row["sentence"], row["label"]) for part in (task.train, task.validation) for row in part]
    assert Counter(parts) == Counter(whole)
    again = load_task("cola", data_dir=tmp_path, holdout=0.1, split_seed=3)
    assert content(again) == content(task)
    assert content(load_task("cola", data_dir=tmp_path, holdout=0.1, split_seed=4)) != content(task)
    small = load_task("cola", data_dir=tmp_path, holdout=0.1, split_seed=3, max_train_samples=9, max_eval_samples=7)
    assert set(small.validation["sentence"]) <= set(task.validation["sentence"])
    assert (len(small.train), len(small.validation)) == (9, 7)


def test_holdout_keeps_every_class_in_training() -> None:
    labels = [0] * 2 + [1] * 40 + [2]
    examples = Examples(texts={"t": [str(i) for i in range(43)]}, labels=labels)
    for fraction in (0.1, 0.5, 0.9):
        rest, held = hold_out(examples, fraction, seed=0, stratify=True)
        assert set(rest.labels) == {0, 1, 2}
        assert len(rest) + len(held) == 43
        assert abs(len(held) - 43 * fraction) < 1
        assert not set(rest.texts["t"]) & set(held.texts["t"])


def test_holdout_of_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    with pytest.raises(DataError, match=r"holding out 0\.1 of 2 training rows leaves one side empty; change holdout"):
        load_task("files", train_file=path)


def test_a_users_file_gives_a_tenth_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 4 == 0]}) + "\n" for i in range(200)))
    task = load_task("files", train_file=path)
    assert task.labels == ("a", "b")
    assert Counter(task.validation["label"]) == {0: 15, 1: 5}
    assert len(task.train) == 180


def test_the_task_checks_itself() -> None:
    split = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    good = {"name": "t", "train": split, "validation": split, "text_columns": ("text",), "labels": ("a", "b")}
    good |= {"metric": "m", "compute_metrics": lambda prediction: {}}
    assert Classification(**good).num_labels == 2
    for change, problem in (
        ({"text_columns": ()}, "names 0 text columns"),
        ({"text_columns": ("body",)}, "no column 'body' in its training rows; there are: text, label"),
        ({"labels": ("a",)}, "has 1 class"),
        ({"validation": split.select([])}, "has no validation rows"),
    ):
        with pytest.raises(DataError, match=problem):
            Classification(**good | change)


def test_docstrings_of_this_python() -> None:
    start = time.perf_counter()
    train, validation, topics = load_docstrings()
    assert time.perf_counter() - start < 10
    assert topics == tuple(TOPICS)
    total = len(train) + len(validation)
    assert total > 3000
    assert 0.12 < len(validation) / total < 0.18
    for part, least in ((train, 200), (validation, 30)):
        counts = Counter(part.labels)
        assert min(counts[label] for label in range(len(topics))) > least
    assert set(train.labels[:100]) == set(range(len(topics)))  # mixed, so that any first rows are a fair sample
    assert max(Counter(train.labels).values()) / len(train) < 0.25  # no topic that a constant guess could live on
    texts = train.texts["text"], validation.texts["text"]
    assert not set(texts[0]) & set(texts[1])
    assert len(set(texts[0]) | set(texts[1])) == total
    assert all(20 <= len(text) <= 1000 and ">>> " not in text for part in texts for text in part)
    about_mail = [label for text, label in zip(texts[0], train.labels, strict=True) if "email" in text.split()]
    assert Counter(about_mail).most_common(1)[0][0] == topics.index("text and data formats")


def test_docstrings_that_are_held_out_are_not_reported() -> None:
    reported, tuned = load_task("docstrings"), load_task("docstrings", holdout=0.1)
    assert not set(reported.validation["text"]) & {*tuned.validation["text"], *tuned.train["text"]}
    assert {*tuned.validation["text"], *tuned.train["text"]} == set(reported.train["text"])
    assert reported.seen_rows == tuned.seen_rows == 0


def test_docstrings_are_read_the_same_from_a_copy_and_without_importing(tmp_path: Path) -> None:
    for module in [modules.split()[0] for modules in TOPICS.values()]:
        lines = ['raise RuntimeError("imported")', "class A:"]
        for number in range(60):
            lines += [f"    def f{number}(self):", f'        r"""Docstring {number} of the module {module}. \\d"""']
        (tmp_path / f"{module}.py").write_text("\n".join(lines))
    (tmp_path / "xml" / "tests").mkdir(parents=True)
    (tmp_path / "xml" / "tests" / "a.py").write_text('"""A docstring of a test, to be left out."""')
    (tmp_path / "xml" / "broken.py").write_text('"""A docstring in a broken file."""\ndef')
    (tmp_path / "xml" / "__init__.py").write_bytes(b'"""A package with a bad escape \\d."""\n')
    train, validation, topics = load_docstrings(tmp_path)
    assert len(train) + len(validation) == 60 * len(topics) + 1
    assert any("bad escape" in text for text in train.texts["text"] + validation.texts["text"])


def test_no_sources_of_the_standard_library(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few Python sources of the standard library"):
        load_docstrings(tmp_path)


def test_clean_takes_doctests_and_indentation_away() -> None:
    docstring = """Sum.

        Adds   up:

        >>> f(1,
        ...   2)
        3
        ... more

            >>> g()

        The end.
        """
    assert clean(docstring) == "Sum.\n\nAdds   up:\n\nThe end."
    assert len(clean("x " * 2000)) == 999

"""What a user's file may hold, and the one line that every fault in it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import load_task
from weightlora.tasks.classes import sort_classes
from weightlora.tasks.files import read_table
from weightlora.tasks.labelled import load_files

GOOD = [{"text": "a fine day", "label": "yes"}, {"text": "a bad day", "label": "no"}] * 10


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def fault(path: Path, **settings: object) -> str:
    """The message of loading ``path`` as a task: one line."""
    with pytest.raises(DataError) as caught:
        load_task("files", train_file=path, **settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_lines_end_at_newline_only_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u2029three\u0085four\x0cfive"
    path.write_bytes(
        ("\ufeff" + json.dumps({"text": text}, ensure_ascii=False) + "\r\n\n" + '{"text": "last"}').encode()
    )
    table = read_table(path)
    assert table.rows == [{"text": text}, {"text": "last"}]
    assert table.lines == [1, 3]


def test_csv_quotes_newlines_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.CSV"
    path.write_bytes(b'text,label\r\n"a, ""b""\r\nc",1\r\n\r\nd\xe2\x80\xa8e,2\r\n')
    table = read_table(path)
    assert table.rows == [{"text": 'a, "b"\r\nc', "label": "1"}, {"text": "d\u2028e", "label": "2"}]
    assert table.lines == [2, 5]


def test_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na,b\t1\n")
    assert read_table(path).rows == [{"text": "a,b", "label": "1"}]


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    assert fault(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such file; check the path"
    assert "cannot be read" in fault(write_folder(tmp_path / "folder.jsonl"))
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.csv", ""), ("d.csv", "text,label\n")):
        (tmp_path / name).write_text(content)
        assert fault(tmp_path / name) == f"{tmp_path / name}: the file is empty; give it at least one row of data"
    (tmp_path / "a.parquet").write_text("x")
    assert "the suffix '.parquet' is not one of .jsonl, .json, .ndjson, .csv, .tsv" in fault(tmp_path / "a.parquet")


def write_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "x", "label": }', "broken JSON (Expecting value"),
        ('{"text": "x"', "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('["x", 1]', "a list, not an object"),
        ("17", "the value 17, not an object"),
        ('{"label": "yes", "body": "x"}', "no column 'text'; there are: 'label', 'body'; name the text's column"),
        ('{"text": "x"}', "no column 'label'; there are: 'text'; name the label's column with label_column"),
        ('{"text": 5, "label": "yes"}', "column 'text' holds 5, not text"),
        ('{"text": null, "label": "yes"}', "column 'text' holds null, not text"),
        ('{"text": "\\ud83d", "label": "yes"}', "half of a surrogate pair"),
        ('{"text": "x", "label": 1.5}', "the label 1.5 is not a class; use a string or a whole number"),
        ('{"text": "x", "label": null}', "the label null is not a class"),
        ('{"text": "x", "label": ""}', 'the label "" is not a class'),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    path.write_text(path.read_text() + "\n" + line + "\n")
    message = fault(path)
    assert message.startswith(f"{path}:22: ")
    assert problem in message
    assert "; " in message  # problem; remedy


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("text,label\na,1\nb\n", 3, "1 cells where the header has 2; quote cells that hold a ','"),
        ("text,label\na,1\nb,c,2\n", 3, "3 cells where the header has 2"),
        ('text,label\na,1\n"b,2\nc,1\n', 3, "broken CSV (unexpected end of data)"),
        ("text,text\na,1\n", 1, "the header names a column twice"),
        ("body,label\na,1\n", 2, "no column 'text'; there are: 'body', 'label'"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, content: str, line: int, problem: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    message = fault(path)
    assert message.startswith(f"{path}:{line}: ")
    assert problem in message


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert fault(path) == f"{path}:2: not UTF-8 text; convert the file to UTF-8"


def test_one_class_and_unseen_labels(tmp_path: Path) -> None:
    single = write(tmp_path / "single.jsonl", [{"text": "a", "label": 1}] * 5)
    assert "all training labels are '1'; a classification task needs at least two classes" in fault(single)
    train = write(tmp_path / "train.jsonl", GOOD)
    other = write(
        tmp_path / "other.jsonl", [GOOD[0], GOOD[1], {"text": "c", "label": "maybe"}, {"text": "d", "label": "x"}]
    )
    message = fault(train, validation_file=other)
    assert message.startswith(f"{other}:3: the label 'maybe' does not occur in training (there: 'no', 'yes'); ")


@pytest.mark.parametrize("label", ["good", None, True, "nan", float("inf"), [1]])
def test_regression_labels_are_finite_numbers(tmp_path: Path, label: object) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": label}])
    message = fault(path, regression=True)
    assert message.startswith(f"{path}:2: the label ")
    assert "is not a finite number; " in message


def test_class_names_are_sorted_by_value_if_whole_numbers(tmp_path: Path) -> None:
    assert sort_classes({"10", "9", "-1"}) == ("-1", "9", "10")
    assert sort_classes({"10", "9", "b"}) == ("10", "9", "b")
    rows = [{"text": "a", "label": label} for label in (10, "9", 9, True)]
    train, _, classes = load_files(
        write(tmp_path / "a.jsonl", rows), None, text_columns=("text",), label_column="label", regression=False
    )
    assert classes == ("10", "9", "true")
    assert train.labels == [0, 1, 1, 2]


def test_columns_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("q,a,score\n" + "".join(f"q{i},a{i},{i / 4}\n" for i in range(20)))
    task = load_task(
        "files", train_file=path, text_column="q", pair_column="a", label_column="score", regression=True, holdout=0.25
    )
    assert task.text_columns == ("q", "a")
    assert task.labels is None
    assert (task.num_labels, task.is_regression, task.metric) == (1, True, "pearson")
    assert (len(task.train), len(task.validation)) == (15, 5)
    rows = [*task.train, *task.validation]
    assert sorted(row["score"] for row in rows) == [i / 4 for i in range(20)]
    assert all(row["a"][1:] == row["q"][1:] == f"{row['score'] * 4:.0f}" for row in rows)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match="task 'files' needs train_file"):
        load_task("files")
    with pytest.raises(ConfigError, match="'text', 'label', 'label' are not all different"):
        load_task("files", train_file=path, pair_column="label")
    for option in ({"train_file": path}, {"text_column": "x"}, {"pair_column": "x"}, {"regression": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))} belongs to task 'files', not to 'docstrings'"):
            load_task("docstrings", **option)  # type: ignore[arg-type]

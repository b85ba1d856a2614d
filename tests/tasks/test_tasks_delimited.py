"""CSV and TSV as people have them: no row is lost in silence, whatever its delimiter, quotes and length."""

from __future__ import annotations

import csv
import io
import logging
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightlora.errors import DataError
from weightlora.tasks import load_task
from weightlora.tasks.files import read_table


def table(path: Path, content: str) -> list[tuple[str, str]]:
    path.write_bytes(content.encode())
    return [(str(row["text"]), str(row["label"])) for row in read_table(path).rows]


def lines_of(count: int = 44, mark: str = "\t") -> list[str]:
    return [f"text{mark}label", *(f"text number {n}{mark}{'pos' if n % 2 else 'neg'}" for n in range(count))]


def test_two_lone_quotes_in_a_tsv_lose_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of()
    lines[5], lines[8], lines[20] = '"Great, he said\tpos', 'the end"\tneg', '"whole"\tpos'
    path = tmp_path / "a.tsv"
    assert table(path, "\n".join(lines)) == [tuple(line.split("\t")) for line in lines[1:]]
    assert f"{path}:6: a quote that encloses no cell; all quotes of this file are read as text" in caplog.text
    lines[5] = '"Great" he said\tpos'  # where a quote closes too early
    assert table(tmp_path / "b.tsv", "\r\n".join(lines)) == [tuple(line.split("\t")) for line in lines[1:]]
    lines[5] = '"Great, he said\tpos'
    lines[20] = "a row\twith\tthree cells"  # which no reading of the quotes explains
    with pytest.raises(DataError, match=r"c\.tsv:21: 3 cells where the header has 2; quote cells that hold a '\\t'"):
        table(tmp_path / "c.tsv", "\n".join(lines))


def test_quotes_that_enclose_cells_of_a_tsv_do_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = 'text\tlabel\n"a ""b"""\tpos\n"one\tcell"\tneg\n"two\nlines"\tpos\n'
    expected = [('a "b"', "pos"), ("one\tcell", "neg"), ("two\nlines", "pos")]
    assert table(tmp_path / "a.tsv", content) == expected
    assert caplog.text == ""


def test_lone_quotes_in_a_csv_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There the standard has a quoted cell go on over lines, so it does; but nobody writes three rows into a cell."""
    lines = lines_of(mark=",")
    lines[5], lines[8] = '"Great,pos', 'the end",neg'
    path = tmp_path / "a.csv"
    assert len(table(path, "\n".join(lines))) == 41
    assert f"{path}:6: a quote opens here and closes on line 9, so these lines are read as one row" in caplog.text
    assert "(1 such place)" in caplog.text
    caplog.clear()
    assert table(tmp_path / "b.csv", 'text,label\n"two\nlines, one comma each,",pos\n') != []
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "head", "mark"),
    [("a.csv", "", ";"), ("a.csv", "", "\t"), ("a.csv", "", "|"), ("a.tsv", "", ","), ("a.csv", "sep=;\r\n", ";"),
     ("a.csv", '"sep=,"\r\n', ",")],
)  # fmt: skip
def test_the_header_says_which_delimiter(tmp_path: Path, name: str, head: str, mark: str) -> None:
    rows = [(f"text number {n}", "pos" if n % 2 else "neg") for n in range(44)]
    assert table(tmp_path / name, head + "\r\n".join(lines_of(mark=mark))) == rows
    assert table(tmp_path / f"{name}.tsv", "text\tlabel\n0,5; more\t1,5\n") == [("0,5; more", "1,5")]


def test_a_quoted_header_keeps_its_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"text; long",label\na,b\n')
    assert read_table(path).rows == [{"text; long": "a", "label": "b"}]
    path.write_text('"text, long";label\na;b\n')
    assert read_table(path).rows == [{"text, long": "a", "label": "b"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_and_line_ends(tmp_path: Path, end: str) -> None:
    content = end.join(["", "  ", "text,label", "a,1", "", " \t ", "b,2", "", ""])
    path = tmp_path / "a.csv"
    assert table(path, content) == [("a", "1"), ("b", "2")]
    assert read_table(path).lines == [4, 7]


def test_cells_of_any_length_and_a_limit_that_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word, " * 40_000
    for text in (long, long.replace(",", "")):
        written = f'"{text}"' if "," in text else text
        assert table(tmp_path / "a.csv", f"text,label\n{written},pos\nb,neg\n") == [(text, "pos"), ("b", "neg")]
        assert csv.field_size_limit() == before
    with pytest.raises(DataError, match=r"a\.csv:2: broken CSV"):
        table(tmp_path / "a.csv", f'text,label\n"{long},pos\n')
    assert csv.field_size_limit() == before
    paths = [tmp_path / f"{n}.csv" for n in range(4)]
    for n, path in enumerate(paths):
        path.write_text(f"text,label\n{'x' * (200_000 * (n + 1))},pos\n")
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda p=p: found.append(len(str(read_table(p).rows[0]["text"])))) for p in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200_000, 400_000, 600_000, 800_000]
    assert csv.field_size_limit() == before


CELLS = st.text(alphabet='ab "\n\r,;|é\u2028\x00=', max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELLS, CELLS.filter(str.strip)), min_size=1, max_size=6),
    mark=st.sampled_from([",", ";", "|", "\t"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_what_pythons_writer_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str]], mark: str, quoting: int
) -> None:
    """Every table, as long as it is quoted: the writer is the independent truth."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=mark, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([("text", "label"), *rows])
    assert table(tmp_path / "a.csv", text.getvalue()) == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text('a "x', min_size=1, max_size=5), st.sampled_from("pn")), min_size=1, max_size=8))
def test_a_tsv_without_quoting_keeps_all_its_rows(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    """One row per line, whatever quotes do; only cells that are quoted throughout the file lose their quotes."""
    found = table(tmp_path / "a.tsv", "\n".join(["text\tlabel", *map("\t".join, rows)]))
    plain = [(text.strip('"').replace('""', '"'), label) for text, label in found]
    assert len(found) == len(rows)
    assert found == rows or plain == [(text.strip('"').replace('""', '"'), label) for text, label in rows]


def test_a_hostile_tsv_takes_no_longer_than_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + '"a "" b\tpos\n' * 50_000)
    began = time.monotonic()
    assert len(read_table(path)) == 50_000
    assert time.monotonic() - began < 5
    (tmp_path / "a.csv").write_text(",".join(["a"] * 50_000) + "\n")
    with pytest.raises(DataError, match="names a column twice"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("{" + ", ".join(f'"{n % 49_999}": 1' for n in range(50_000)) + "}")
    with pytest.raises(DataError, match='the key "0" occurs twice in one object'):
        read_table(tmp_path / "a.jsonl")
    assert time.monotonic() - began < 10


def test_classes_are_counted_and_lookalikes_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["pos"] * 12 + ["pos "] * 3 + ["café"] * 4 + ["cafe\u0301"] * 5 + ["1"] * 6 + ["1.0"] * 2 + ["TEA", "tea"]
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"row {n},{label}\n" for n, label in enumerate(labels)), encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="weightlora"):
        task = load_task("files", train_file=path)
        load_task("files", train_file=path)
    assert set(task.model_settings["labels"]) == set(labels), "told, and left as they are"
    listed, several, single = (record.getMessage() for record in caplog.records)  # once, though read twice
    assert listed.startswith(f"{path}: 34 rows in 8 classes: 'pos' 12, '1' 6, ")
    for name in set(labels):
        assert f"{name!r} {labels.count(name)}" in listed
    for pair in (
        "'pos' (12 rows) and 'pos ' (3 rows)",
        "'cafe\\u0301' (5 rows) and 'caf\\xe9' (4 rows)",
        "'1' (6 rows) and '1.0' (2 rows)",
        "'TEA' (1 row) and 'tea' (1 row)",
    ):
        assert pair in several
    assert "2 of 8 classes in column 'label' have one row ('TEA', 'tea')" in single


def test_classes_that_only_look_near_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [str(2**53), str(2**53 + 1), "1_0", "10", "infinity", "nan", "a b", "ab", "-1", "1e999999", "Ⅳx", "IVy"]
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"row {n},{labels[n % 12]}\n" for n in range(36)), encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="weightlora"):
        load_task("files", train_file=path)
    (only,) = (record.getMessage() for record in caplog.records)
    assert "36 rows in 12 classes" in only
    assert only.endswith(", and 4 more, the smallest with 3")


def test_empty_texts_and_contradictions_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    rows = [f"row {n % 15},{'pos' if n < 18 else 'neg'}\n" for n in range(30)]
    path.write_text("text,label\n" + "".join(rows) + ",pos\n  ,neg\n")
    task = load_task("files", train_file=path)
    assert len(task.train) + len(task.validation) == 32
    assert f"{path}: 2 of 32 rows have no text in column 'text'" in caplog.text
    assert f"{path}: 12 of 17 different texts have more than one label" in caplog.text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a", "text": "b", "label": 1}', 'broken JSON (the key "text" occurs twice in one object)'),
        ('{"text": "a", "label": "x"} {"text": "b", "label": "y"}', "broken JSON (Extra data"),
        ('{"text": "a", "label": "x"}\r{"text": "b", "label": "y"}', "broken JSON (Extra data"),
    ],
)
def test_json_that_would_lose_something(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"text": "a", "label": "x"}}\n{line}\n'.encode())
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}:2: {problem}")

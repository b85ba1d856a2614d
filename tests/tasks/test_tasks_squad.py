"""SQuAD: the official numbers on real questions, windows and spans against brute force, and what is wrong with rows."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad as torchmetrics_squad

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import LoadedModel, QuestionAnswering, load_model, load_task, text_metrics
from weightlora.tasks.answers import _windows
from weightlora.tasks.spans import best_spans


def heuristic(number: int, row: dict[str, Any]) -> str:
    """A prediction without a model: some words of the sentence most like the question; every fifth nearly right."""
    answers = row["answers"]["text"]
    if answers and number % 5 == 0:
        return f"The {answers[-1].upper()}."
    asked = set(re.findall(r"\w+", row["question"].lower()))
    sentences = re.split(r"(?<=[.!?])\s+", row["context"])
    best = max(sentences, key=lambda sentence: len(asked & set(re.findall(r"\w+", sentence.lower()))))
    words = [word for word in best.split() if word.lower().strip(".,") not in asked]
    return " ".join(words[: sum(map(ord, row["id"])) % 6])


def read(data_dir: Path, name: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    with (data_dir / name / "validation.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    predictions = {row["id"]: heuristic(number, row) for number, row in enumerate(rows)}
    return predictions, {row["id"]: row["answers"]["text"] for row in rows}


# What the official evaluate-v1.1.py and evaluate-v2.0.py print for these predictions on both whole validation sets.
OFFICIAL = {
    "squad": {"exact_match": 21.419110690633868, "f1": 28.968002303452625},
    "squad_v2": {
        "exact": 20.03705887307336,
        "f1": 23.983725258969066,
        "HasAns_exact": 21.676788124156545,
        "HasAns_f1": 29.58143893382916,
        "NoAns_exact": 18.40201850294365,
        "NoAns_f1": 18.40201850294365,
    },
}


@pytest.mark.parametrize(("name", "questions"), [("squad", 10570), ("squad_v2", 11873)])
def test_numbers_are_those_of_the_official_scripts(data_dir: Path, name: str, questions: int) -> None:
    predictions, references = read(data_dir, name)
    assert len(predictions) == questions
    found = getattr(text_metrics, name)(predictions, references)
    assert found == pytest.approx(OFFICIAL[name], rel=1e-12)


def test_each_question_scores_as_in_torchmetrics(data_dir: Path) -> None:
    """An implementation by others, question by question. It departs from the official F1 where no word is left."""
    predictions, references = read(data_dir, "squad")
    judged = 0
    for key in list(predictions)[:1500]:
        words = [text_metrics.normalize_answer(text) for text in (predictions[key], *references[key])]
        if not all(words):
            continue
        target = {"id": key, "answers": {"text": references[key], "answer_start": [0] * len(references[key])}}
        theirs = torchmetrics_squad({"id": key, "prediction_text": predictions[key]}, target)
        ours = text_metrics.squad({key: predictions[key]}, {key: references[key]})
        assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, rel=1e-5)
        second = text_metrics.squad_v2({key: predictions[key]}, {key: references[key]})
        assert (second["exact"], second["f1"]) == (ours["exact_match"], ours["f1"])
        judged += 1
    assert judged > 1000


@pytest.mark.parametrize(
    ("guess", "answers", "first", "second"),
    [
        ("", ["the"], (100.0, 0.0), (100.0, 100.0)),  # nothing is left of either: the two scripts differ
        ("the", ["a b", "The"], (100.0, 0.0), (0.0, 0.0)),  # 2.0 does not count an answer of which nothing is left
        ("b c c", ["c c d"], (0.0, 100 * 2 / 3), (0.0, 100 * 2 / 3)),
    ],
)
def test_what_is_left_of_nothing(guess: str, answers: list[str], first: tuple[float, float], second: Any) -> None:
    one, two = text_metrics.squad({"q": guess}, {"q": answers}), text_metrics.squad_v2({"q": guess}, {"q": answers})
    assert (one["exact_match"], one["f1"]) == pytest.approx(first)
    assert (two["exact"], two["f1"]) == pytest.approx(second)


logit = st.integers(-4, 4).map(float)  # few values, so that ties are common


@settings(deadline=None)
@given(st.lists(st.tuples(logit, logit), min_size=1, max_size=9), st.integers(1, 12), st.integers(1, 12))
def test_best_spans_are_those_of_brute_force(logits: list[tuple[float, float]], n_best: int, longest: int) -> None:
    start, end = np.array(logits).T
    every = [(start[i] + end[j], i, j) for i in range(len(start)) for j in range(i, len(start)) if j - i + 1 <= longest]
    expected = sorted(every, key=lambda span: (-span[0], span[1], span[2]))[:n_best]
    assert best_spans(start, end, n_best=n_best, max_answer_length=longest) == expected


def test_a_text_without_tokens_has_no_span() -> None:
    assert best_spans(np.zeros(0), np.zeros(0), n_best=3, max_answer_length=3) == []


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("bert-tiny-shape", head="question-answering")


def oracle(task: QuestionAnswering, loaded: LoadedModel, length: int, stride: int) -> tuple[Any, Any, Any]:
    """Logits of a model that knows: 1 at the answer's first and last token (or at "no answer") of every window."""
    rows, windows = _windows(task.validation, loaded.tokenizer, length, stride)
    start, end = (np.zeros((len(rows), length)) for _ in range(2))
    start[np.arange(len(rows)), rows["start_positions"]] = 1
    end[np.arange(len(rows)), rows["end_positions"]] = 1
    return start, end, windows


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (96, 24)])
def test_a_model_that_knows_the_answers_gets_them_all(
    data_dir: Path, loaded: LoadedModel, length: int, stride: int
) -> None:
    """Through windows, positions, spans and offsets and back: what is lost is answers that are no whole words."""
    rows = {"data_dir": data_dir, "max_train_samples": 1, "max_eval_samples": 300}
    task: Any = load_task("squad_v2", **rows)
    start, end, windows = oracle(task, loaded, length, stride)
    assert len({window.example for window in windows}) == 300
    assert all(len(window.offsets) <= length for window in windows)
    found = task.judge(start, end, windows)
    assert found["NoAns_exact"] == 100.0
    assert found["HasAns_f1"] > 98


def test_every_token_of_a_text_is_in_a_window_and_neighbours_share_the_stride(
    data_dir: Path, loaded: LoadedModel
) -> None:
    task: Any = load_task("squad", data_dir=data_dir, max_train_samples=1, max_eval_samples=40)
    rows, windows = _windows(task.validation, loaded.tokenizer, 80, 20)
    assert len(windows) > 80
    for example in range(40):
        context = task.validation[example]["context"]
        plain = loaded.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        parts = [window.offsets for window in windows if window.example == example]
        assert parts[0] + [pair for part in parts[1:] for pair in part[20:]] == plain
        for before, after in itertools.pairwise(parts):
            assert before[-20:] == after[:20]
    for row, window in zip(rows, windows, strict=True):
        first, last = row["start_positions"], row["end_positions"]
        if first != window.cls:
            example = task.validation[window.example]
            begin, stop = window.offsets[first - window.first][0], window.offsets[last - window.first][1]
            assert example["answers"][0] in example["context"][begin:stop]
            assert stop - begin <= len(example["answers"][0]) + 12


def one_question(answers: list[str], threshold: float = 0.0, *, second: bool = True) -> QuestionAnswering:
    from datasets import Dataset

    context = "red green blue"
    rows = Dataset.from_dict(
        {"id": ["q"], "context": [context], "question": ["which?"], "answers": [answers]}
        | {"answer_starts": [[context.index(answer) for answer in answers]]}
    )
    return QuestionAnswering(
        name="squad_v2", train=rows, validation=rows, metric="f1", may_be_unanswerable=second,
        null_score_diff_threshold=threshold,
    )  # fmt: skip


def test_no_answer_is_given_where_it_leads_by_more_than_the_threshold(loaded: LoadedModel) -> None:
    # [CLS] which ? [SEP] red green blue [SEP]
    start, end = np.zeros((1, 8)), np.zeros((1, 8))
    start[0, 5], end[0, 5], start[0, 0] = 1.0, 1.0, 4.0  # "green" at 2, nothing at 4
    for threshold, said in ((1.9, ""), (2.0, "green"), (5.0, "green"), (-9.0, "")):
        task = one_question(["green"], threshold)
        _, windows = _windows(task.validation, loaded.tokenizer, 40, 4)
        assert task.predict(start, end, windows) == {"q": said}, threshold
    task = one_question(["green"], 1.9, second=False)
    assert task.predict(start, end, windows) == {"q": "green"}, "SQuAD 1.1 always answers"
    # Over several windows the smallest score of "no answer" counts, and the best span.
    twice = [windows[0], windows[0]]
    start, end = np.vstack([start, start]), np.vstack([end, end])
    start[1, 0], start[1, 6], end[1, 6] = -1.0, 3.0, 3.0
    assert one_question(["green"]).predict(start, end, twice) == {"q": "blue"}


def write(folder: Path, change: dict[str, Any], name: str = "squad") -> Path:
    good = {"id": "a", "title": "t", "context": "red green", "question": "which?"}
    good |= {"answers": {"text": ["green"], "answer_start": [4]}}
    rows = [{**good, "id": "first"}, {key: value for key, value in {**good, **change}.items() if value is not None}]
    (folder / name).mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "no column 'question'"),
        ({"answers": None}, "no column 'answers'"),
        ({"context": 3}, "column 'context' holds 3, not text"),
        ({"answers": ["green"]}, "answers must be"),
        ({"answers": {"text": ["green"], "answer_start": []}}, "two lists of one length"),
        ({"answers": {"text": ["green"], "answer_start": ["4"]}}, "a text and a whole number"),
        ({"answers": {"text": [" "], "answer_start": [3]}}, "an answer is empty"),
        (
            {"answers": {"text": ["green"], "answer_start": [3]}},
            'the answer "green" is not in the context at character 3',
        ),
        ({"answers": {"text": ["n"], "answer_start": [-1]}}, "is not in the context at character -1"),
        ({"answers": {"text": [], "answer_start": []}}, "no answer, which task 'squad' does not allow; use squad_v2"),
        ({"id": "first"}, "the id 'first' is that of line 1"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task("squad", data_dir=write(tmp_path, change))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/squad/train.jsonl:2: ")
    assert "\n" not in str(caught.value)


def test_questions_without_answer_are_for_the_second_version_and_settings_for_their_task(tmp_path: Path) -> None:
    none = {"answers": {"text": [], "answer_start": []}}
    assert load_task("squad_v2", data_dir=write(tmp_path, none, "squad_v2")).validation["answers"] == [["green"], []]
    folder = write(tmp_path, {})
    with pytest.raises(ConfigError, match="null_score_diff_threshold belongs to task 'squad_v2', not to 'squad'"):
        load_task("squad", data_dir=folder, null_score_diff_threshold=1.0)
    with pytest.raises(ConfigError, match="doc_stride belongs to task 'squad', 'squad_v2', not to 'docstrings'"):
        load_task("docstrings", doc_stride=3)
    with pytest.raises(ConfigError, match="doc_stride=-1 is negative"):
        load_task("squad", data_dir=folder, doc_stride=-1)
    with pytest.raises(ConfigError, match="max_answer_length=0"):
        load_task("squad", data_dir=folder, max_answer_length=0)


def test_a_window_needs_more_room_than_the_stride(tmp_path: Path, loaded: LoadedModel) -> None:
    task = load_task("squad", data_dir=write(tmp_path, {"question": "why " * 100}), doc_stride=20)
    # The question is cut to 64 tokens, three are special.
    with pytest.raises(ConfigError, match=r"max_length=87 leaves 20 tokens for the text .* doc_stride=20"):
        task.prepare(loaded, 87)
    assert len(task.prepare(loaded, 88).train) == 2


def test_questions_on_one_text_are_held_out_together(data_dir: Path) -> None:
    task = load_task("squad", data_dir=data_dir, holdout=0.2)
    held, rest = set(task.validation["context"]), set(task.train["context"])
    assert not held & rest
    assert len(held) == round(0.2 * len(held | rest))
    assert len(task.train) + len(task.validation) == 8265

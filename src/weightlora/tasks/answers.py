"""Extractive question answering, SQuAD 1.1 and 2.0: sliding windows in, the best span of each question out."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from weightlora.errors import ConfigError
from weightlora.tasks import text_metrics
from weightlora.tasks.files import Table, read_texts
from weightlora.tasks.models import LoadedModel
from weightlora.tasks.spans import best_spans
from weightlora.tasks.task import Head, Prepared, Task

N_BEST = 20
MAX_QUESTION_TOKENS = 64  # as BERT's own script; what is longer is cut at the end
COLUMNS = ("id", "context", "question", "answers")
FEATURES = Features(
    {name: Value("string") for name in ("id", "context", "question")}
    | {"answers": Sequence(Value("string")), "answer_starts": Sequence(Value("int64"))}
)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Find the answer to a question in a text, or, with ``may_be_unanswerable``, that there is none.

    Args:
        doc_stride: tokens that neighbouring windows over one text share; None: a third of the window (128 of 384).
        max_answer_length: the most tokens in an answer.
        null_score_diff_threshold: no answer is given where ``null - best > threshold``, with ``best`` the largest
            ``start[i] + end[j]`` over all windows and ``null`` the smallest ``start[cls] + end[cls]``.
        may_be_unanswerable: SQuAD 2.0's rules.

    Source: Devlin et al. 2019 (BERT), sections 4.2 and 4.3; Rajpurkar et al. 2018.
    """

    head: ClassVar[Head] = "question-answering"

    may_be_unanswerable: bool = False
    doc_stride: int | None = None
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.doc_stride is not None and self.doc_stride < 0:
            raise ConfigError(f"doc_stride={self.doc_stride} is negative; use 0 or more")
        if self.max_answer_length < 1:
            raise ConfigError(f"max_answer_length={self.max_answer_length} is not allowed; use 1 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        return (*COLUMNS, "answer_starts")

    @property
    def inputs(self) -> tuple[str, ...]:
        return "context", "question"

    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        tokenizer = loaded.tokenizer
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model {loaded.name!r} has a slow tokenizer, which cannot map tokens to text; use another"
            )
        length = min(max_length, tokenizer.model_max_length)
        stride = length // 3 if self.doc_stride is None else self.doc_stride
        train, _ = _windows(self.train, tokenizer, length, stride)
        validation, windows = _windows(self.validation, tokenizer, length, stride)
        right = copy.deepcopy(tokenizer)
        right.padding_side = "right"  # positions count from the left

        def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
            start, end = map(np.asarray, prediction.predictions)
            return self.judge(start, end, windows)

        return Prepared(
            train=train,
            validation=validation,
            collator=DataCollatorWithPadding(right),
            compute_metrics=compute_metrics,
            ordered=True,
            # Encoder-decoder models hand over their encoder's states as well.
            preprocess_logits=lambda logits, labels: tuple(logits[:2]),
        )

    def judge(self, start: np.ndarray, end: np.ndarray, windows: list[Window]) -> dict[str, float]:
        """The task's numbers from the logits of all validation windows: two arrays (windows, tokens)."""
        rows = self.validation
        references = dict(zip(rows["id"], rows["answers"], strict=True))
        predictions = self.predict(start, end, windows)
        return (text_metrics.squad_v2 if self.may_be_unanswerable else text_metrics.squad)(predictions, references)

    def predict(self, start: np.ndarray, end: np.ndarray, windows: list[Window]) -> dict[str, str]:
        """The predicted text of every validation question, by id; "" where there is none."""
        found: dict[int, list[tuple[float, str]]] = defaultdict(list)
        null: dict[int, float] = {}
        contexts = list(self.validation["context"])
        for row, window in enumerate(windows):
            s, e = (np.asarray(logits[row], dtype=np.float64) for logits in (start, end))
            score = float(s[window.cls] + e[window.cls])
            null[window.example] = min(score, null.get(window.example, score))
            within = slice(window.first, window.first + len(window.offsets))
            for score, i, j in best_spans(
                s[within], e[within], n_best=N_BEST, max_answer_length=self.max_answer_length
            ):
                text = contexts[window.example][window.offsets[i][0] : window.offsets[j][1]]
                if text.strip():
                    found[window.example].append((score, text))
        predictions = {}
        for example, name in enumerate(self.validation["id"]):
            best, text = max(found[example], key=lambda pair: pair[0], default=(-np.inf, ""))
            nothing = self.may_be_unanswerable and null[example] - best > self.null_score_diff_threshold
            predictions[name] = "" if nothing else text
        return predictions


@dataclass(frozen=True, kw_only=True)
class Window:
    """One window over one example's text.

    Args:
        example: row of the example.
        cls: position of the token that stands for "no answer".
        first: position of the first token of the text.
        offsets: (start, end) in the text of each of its tokens.
    """

    example: int
    cls: int
    first: int
    offsets: list[tuple[int, int]]


def read_squad(table: Table, name: str, *, may_be_unanswerable: bool) -> Dataset:
    """Check the rows of a SQuAD-like table.

    Raises:
        DataError: a missing column, an empty answer, a question without one where there must be one, an answer that
            is not in the context where it claims to be, an id that occurs twice.
    """
    remedy = f"task {name!r} needs the columns {', '.join(COLUMNS)}"
    columns = {column: read_texts(table, column, remedy) for column in COLUMNS[:3]}
    answers: list[list[str]] = []
    answer_starts: list[list[int]] = []
    seen: dict[str, int] = {}
    for row, value in enumerate(table.column("answers", remedy)):
        before = seen.setdefault(columns["id"][row], row)
        if before != row:
            raise table.error(
                row, f"the id {columns['id'][row]!r} is that of line {table.lines[before]}; make ids unique"
            )
        texts, starts = _answers(table, row, value)
        if not texts and not may_be_unanswerable:
            raise table.error(row, f"the question has no answer, which task {name!r} does not allow; use squad_v2")
        for text, start in zip(texts, starts, strict=True):
            if columns["context"][row][start : start + len(text)] != text or start < 0:
                raise table.error(
                    row, f"the answer {_short(text)} is not in the context at character {start}; repair answer_start"
                )
        answers.append(texts)
        answer_starts.append(starts)
    return Dataset.from_dict({**columns, "answers": answers, "answer_starts": answer_starts}, features=FEATURES)


def _answers(table: Table, row: int, value: object) -> tuple[list[str], list[int]]:
    shape = 'answers must be {"text": [...], "answer_start": [...]}, two lists of one length'
    if not isinstance(value, dict):
        raise table.error(row, f"{shape}; this is {_short(value)}")
    texts, starts = value.get("text"), value.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise table.error(row, f"{shape}; this is {_short(value)}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
            raise table.error(row, f"an answer is a text and a whole number; this is {_short(text)}, {_short(start)}")
        if not text.strip():
            raise table.error(row, "an answer is empty; give its text, or two empty lists where there is none")
    return texts, starts


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> tuple[Dataset, list[Window]]:
    """Question and text in windows of ``length`` tokens that overlap by ``stride``, with the answer's positions."""
    questions = _cut_questions(list(rows["question"]), tokenizer)
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
    room = length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        raise ConfigError(
            f"max_length={length} leaves {max(room, 0)} tokens for the text beside the longest question, no more than"
            f" doc_stride={stride}; give a larger max_length or a smaller doc_stride"
        )
    encoded = tokenizer(
        questions,
        list(rows["context"]),
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows, positions = [], []
    answers, starts = list(rows["answers"]), list(rows["answer_starts"])
    for number, example in enumerate(encoded["overflow_to_sample_mapping"]):
        part = encoded.sequence_ids(number)
        first = part.index(1) if 1 in part else len(part)
        offsets = [pair for pair, side in zip(encoded["offset_mapping"][number], part, strict=True) if side == 1]
        ids = encoded["input_ids"][number]
        cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        window = Window(example=example, cls=cls, first=first, offsets=offsets)
        windows.append(window)
        answer = (starts[example][0], answers[example][0]) if answers[example] else None
        positions.append(_positions(window, answer))
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    features = Features(
        {name: Sequence(Value("int32" if name == "input_ids" else "int8")) for name in columns}
        | {name: Value("int64") for name in ("start_positions", "end_positions")}
    )
    begins, ends = zip(*positions, strict=True)
    labels = {"start_positions": list(begins), "end_positions": list(ends)}
    return Dataset.from_dict({**columns, **labels}, features=features), windows


def _cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    stripped = [question.strip() for question in questions]  # leading space makes some tokenizers overflow
    offsets = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        question if len(spans) <= MAX_QUESTION_TOKENS else question[: spans[MAX_QUESTION_TOKENS - 1][1]]
        for question, spans in zip(stripped, offsets, strict=True)
    ]


def _positions(window: Window, answer: tuple[int, str] | None) -> tuple[int, int]:
    """First and last token of the answer; the "no answer" token where there is none, or not wholly in this window."""
    if answer is None or not window.offsets:
        return window.cls, window.cls
    start, end = answer[0], answer[0] + len(answer[1])
    if window.offsets[0][0] > start or window.offsets[-1][1] < end:
        return window.cls, window.cls
    inside = [k for k, (a, b) in enumerate(window.offsets) if b > start and a < end]
    if not inside:
        return window.cls, window.cls
    return window.first + inside[0], window.first + inside[-1]

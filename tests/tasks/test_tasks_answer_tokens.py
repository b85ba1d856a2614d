"""Classes told by answer tokens: prompts, words, scores by brute force, and what is refused. And eval_loss of every
task whose loss is on tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs.commands import spec
from tests.tasks.evaluating import evaluate

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.tasks import (
    AnswerTokens,
    LoadedModel,
    Prepared,
    by_answer_tokens,
    completes_text,
    load_model,
    load_task,
    read_task,
    tell_once,
)
from weightlora.tasks.answer_tokens import PROMPTS
from weightlora.tasks.glue import GLUE

SINGLE = "0=bad,1=good,2=so"
SEVERAL = "0=very bad,1=good,2=neither good nor bad"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    made = load_model("llama-small-shape", head="causal-lm")
    with torch.no_grad():  # what it says must depend on what it read
        for parameter in made.model.parameters():
            parameter.mul_(3)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.csv"
    texts = ("a film of much depth", "slow", "it is fine and all in all a little long for what it says")
    lines = [f'"{text} {n}",{(n + len(text)) % 3}' for n in range(4) for text in texts]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return path


def own(file: Path, words: str | None = None, **settings: Any) -> AnswerTokens:
    task = load_task("files", train_file=file, validation_file=file)
    return by_answer_tokens(task, words=words, **settings)  # type: ignore[arg-type]


def losses(loaded: LoadedModel, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each token of an answer, one row at a time."""
    with torch.no_grad():
        logs = loaded.model.eval()(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return [-float(logs[len(prompt) + t - 1, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_scores_by_brute_force(file: Path, loaded: LoadedModel, tmp_path: Path, words: str) -> None:
    task, tokenizer = own(file, words), loaded.tokenizer
    found = evaluate(task.prepare(loaded, 64), loaded, tmp_path)
    answers = [tokenizer(word.partition("=")[2], add_special_tokens=False)["input_ids"] for word in words.split(",")]
    right, of_truth = 0, []
    for row in task.validation:
        prompt = tokenizer(f"[CLS] {row['text']}\nLabel:", add_special_tokens=False)["input_ids"]
        each = [losses(loaded, prompt, answer) for answer in answers]
        means = [sum(values) / len(values) for values in each]
        right += means.index(min(means)) == row["label"]
        of_truth += each[row["label"]]
    assert found["eval_accuracy"] == pytest.approx(right / len(task.validation))
    assert found["eval_loss"] == pytest.approx(sum(of_truth) / len(of_truth), rel=1e-5)


def test_only_the_right_word_is_learned(file: Path, loaded: LoadedModel) -> None:
    task = own(file, SEVERAL)
    parts = task.prepare(loaded, 64)
    assert len(parts.train) == len(task.train)
    for row, source in zip(parts.train, task.train, strict=True):
        shown = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        learned = [label for label in row["labels"] if label != -100]
        assert loaded.tokenizer.decode(shown) == f"[CLS] {source['text']} label :"
        assert loaded.tokenizer.decode(learned) == task.words[source["label"]]


def test_what_is_asked_is_printed(file: Path, loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    tell_once.cache_clear()
    with caplog.at_level("INFO", logger="weightlora"):
        own(file, SEVERAL).prepare(loaded, 64)
    assert "prompts such as: '[CLS] a film of much depth 0 label :'" in caplog.text
    assert "answers: 0: 'very bad' (2 tokens); 1: 'good' (1 token); 2: 'neither good nor bad' (4 tokens)" in caplog.text


def test_words_are_derived(data_dir: Path) -> None:
    assert set(PROMPTS) == {name for name, spec in GLUE.items() if spec.labels is not None}
    for name, (prompt, words) in PROMPTS.items():
        assert all(f"{{{column}}}" in prompt for column in GLUE[name].columns)
        assert len(set(words)) == len(words) == len(GLUE[name].labels or ())
    asked = by_answer_tokens(load_task("mrpc", data_dir=data_dir))  # type: ignore[arg-type]
    assert (asked.metric, asked.labels, asked.words) == ("acc_f1", ("not_equivalent", "equivalent"), ("no", "yes"))
    topics = by_answer_tokens(load_task("docstrings"))  # type: ignore[arg-type]
    assert topics.words == tuple(label.replace("_", " ") for label in topics.labels or ())


def test_long_texts_are_cut_and_the_question_stays(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [("one " * 50, "two"), ("one", "two " * 50), ("one " * 50, "two " * 50), ("one", "two")]
    rows = [{"a": a.strip(), "b": b.strip(), "label": n % 2} for n, (a, b) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = load_task("files", train_file=path, validation_file=path, text_column="a", pair_column="b")
    asked = by_answer_tokens(task, prompt="{a} and {b} so:", words="0=no,1=yes")  # type: ignore[arg-type]
    texts = [loaded.tokenizer.decode(row["input_ids"]).split() for row in asked.prepare(loaded, 20).train]
    assert all(text[-3:-1] == ["so", ":"] for text in texts)
    assert [len(text) for text in texts] == [20, 20, 20, 7]
    # Longest first, as for pairs anywhere.
    assert [(text.count("one"), text.count("two")) for text in texts] == [(14, 1), (1, 14), (7, 8), (1, 1)]
    with pytest.raises(ConfigError, match="max_length=5 leaves no room for a text"):
        asked.prepare(loaded, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": "0=Good,1=good"}, "the words 'Good' and 'good' are the same tokens"),
        ({"words": "0=bad,1=\u4e5f\u0e57\U0001f9ff"}, "the tokenizer has no tokens for the word"),
        ({"words": "bad,good"}, "label_words has 'bad'; write CLASS=WORD, .* of: 0, 1, 2"),
        ({"words": "0=a,0=b"}, "label_words has '0=b'"),
        ({"words": "7=a"}, "label_words has '7=a'"),
        ({"words": "1="}, "label_words has '1='"),
        ({"prompt": "{texts}:"}, r"must name columns of task 'files': \{text\}"),
        ({"prompt": "Label:"}, "must name columns"),
        ({"prompt": "{text:"}, "is not a text with columns in braces"),
    ],
)
def test_what_cannot_be_asked(file: Path, loaded: LoadedModel, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        own(file, **settings).prepare(loaded, 64)
    assert "\n" not in str(error.value)


def saved(loaded: LoadedModel, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_who_tells_the_classes(loaded: LoadedModel, data_dir: Path, tmp_path: Path) -> None:
    """A pretrained decoder answers; whatever else gets a head; both can be asked for."""
    decoder = str(saved(loaded, tmp_path / "decoder"))
    classifier = str(saved(load_model("llama-small-shape", num_labels=2), tmp_path / "classifier"))
    assert [completes_text(name) for name in (decoder, classifier)] == [True, False]
    for name, row in (
        ("sst2", {"sentence": "a", "label": 1}),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 3}),
    ):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")

    def asks(task: str = "sst2", **settings: Any) -> bool:
        folder = str(data_dir) if task == "gsm8k" else str(tmp_path)
        run = spec(data_dir=folder, task=task, **settings)
        return isinstance(read_task(run.task, run.model.name), AnswerTokens)

    assert asks(model="smollm2")
    assert asks(model=decoder)
    assert asks(model="llama-small-shape", classify_by="answer")
    assert not any(asks(model=model) for model in ("minilm", "llama-small-shape", classifier))
    assert not asks(model=decoder, classify_by="head")
    assert not asks("stsb", model=decoder), "a number has no words"
    for settings, message in (
        ({"task": "stsb", "classify_by": "answer"}, "predicts a number, which has no answer tokens"),
        ({"task": "gsm8k", "classify_by": "answer"}, "classify_by belongs to classification, not to task 'gsm8k'"),
        ({"task": "gsm8k", "prompt": "{question}"}, "prompt belongs to classification"),
        ({"model": "minilm", "label_words": "negative=bad"}, "label_words is for a model that answers in words"),
        ({"classify_by": "ask"}, "classify_by='ask' is unknown; use one of head, answer"),
    ):
        with pytest.raises(WeightLoRAError, match=message):
            asks(**settings)


@pytest.mark.parametrize("task", ["completions", "gsm8k", "xsum"])
def test_eval_loss_is_the_mean_over_answer_tokens(
    task: str, loaded: LoadedModel, data_dir: Path, tmp_path: Path
) -> None:
    """Over all tokens alike, not a mean of the batches' means."""
    rows = {"max_train_samples": 2, "max_eval_samples": 5}
    model = loaded
    if task == "completions":
        path = tmp_path / "own.jsonl"
        texts = [{"prompt": f"count to {n}", "completion": " one two three" * n} for n in range(1, 8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        parts = load_task(str(path), validation_file=path).prepare(loaded, 64)
    elif task == "gsm8k":
        parts = load_task("gsm8k", data_dir=data_dir, max_target_length=2, **rows).prepare(loaded, 512)
    else:
        model = load_model("bart-small-shape", head="seq2seq-lm")
        parts = load_task("xsum", data_dir=data_dir, max_target_length=24, **rows).prepare(model, 48)
    training = {**parts.training, "generation_num_beams": 1, "generation_max_length": 3}
    parts = Prepared(**{**vars(parts), "training": training if task != "completions" else parts.training})
    found = evaluate(parts, model, tmp_path / "out")
    total, count = 0.0, 0
    for row in parts.validation:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model.model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits.double()
        scores, truth = (logits[0], labels[0]) if task == "xsum" else (logits[0, :-1], labels[0, 1:])
        total += float(torch.nn.functional.cross_entropy(scores, truth, ignore_index=-100, reduction="sum"))
        count += int((truth != -100).sum())
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    if task == "completions":
        assert math.log(found["eval_perplexity"]) == pytest.approx(found["eval_loss"])

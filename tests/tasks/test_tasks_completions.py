"""Causal language modelling: what is learned, what is generated, what is judged, and what is wrong with rows."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import LoadedModel, Task, load_model, load_task
from weightlora.tasks.completions import final_number, token_metrics
from weightlora.tasks.evaluation import token_scores
from weightlora.tasks.generate import PromptTrainer, prompts_of
from weightlora.tasks.sources import SOURCES

CHATML = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model("llama-small-shape", head="causal-lm")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def load(path: Path, **settings: Any) -> Task:
    return load_task(str(path), **settings)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def learned(task: Task, loaded: LoadedModel) -> list[tuple[str, str]]:
    """What each training row shows and what it teaches, as text with special tokens."""
    rows = task.prepare(loaded, 64).train
    show, teach = [], []
    for row in rows:
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        begin = int((labels != -100).argmax())
        assert (labels[:begin] == -100).all()
        assert (labels[begin:] == ids[begin:]).all(), "the completion is learned whole, and nothing else"
        show.append(loaded.tokenizer.decode(ids[:begin]))
        teach.append(loaded.tokenizer.decode(ids[begin:]))
    return list(zip(show, teach, strict=True))


def test_the_loss_is_on_the_completion_alone(tmp_path: Path, loaded: LoadedModel) -> None:
    rows = [{"prompt": f"the color {n} is", "completion": " deep blue"} for n in range(20)]
    task = load(write(tmp_path / "own.jsonl", *rows))
    assert (len(task.train), len(task.validation), task.metric) == (18, 2, "mean_token_accuracy")
    pairs = learned(task, loaded)
    assert {teach for _, teach in pairs} == {"deep blue [SEP]"}
    assert all(re.fullmatch(r"\[CLS\] the color \d+ is", show) for show, _ in pairs)


def test_of_a_chat_the_last_answer_is_learned_through_the_template(tmp_path: Path, loaded: LoadedModel) -> None:
    messages = [{"messages": chat("hi", "hello", f"color {n}", "blue")} for n in range(4)]
    split = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in messages]
    files = [write(tmp_path / name, *rows) for name, rows in (("a.jsonl", messages), ("b.jsonl", split))]
    with pytest.raises(ConfigError, match="tokenizer of model 'llama-small-shape' has no chat template"):
        load(files[0], validation_file=files[0]).prepare(loaded, 64)
    loaded.tokenizer.chat_template = CHATML
    both = [learned(load(file, validation_file=file), loaded) for file in files]
    assert both[0] == both[1]
    assert both[0][2] == (
        "< user > hi < end > < assistant > hello < end > < user > color 2 < end > < assistant >",
        "blue < end >",
    )
    loaded.tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ConfigError, match="rewrites the prompt once there is an answer"):
        load(files[0], validation_file=files[0]).prepare(loaded, 64)


def test_prompts_are_cut_out_and_padded_on_the_left(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 6, (4, 2), generator=generator).tolist()
        rows = [torch.randint(5, 99, (sum(pair),), generator=generator).tolist() for pair in lengths]
        width = max(map(len, rows)) + 1
        for left in (False, True):

            def pad(values: list[int], fill: int, left: bool = left, width: int = width) -> list[int]:
                blank = [fill] * (width - len(values))
                return [*blank, *values] if left else [*values, *blank]

            labels = [[-100] * p + row[p:] for row, (p, _) in zip(rows, lengths, strict=True)]
            ids, mask = prompts_of(
                torch.tensor([pad(row, 0) for row in rows]),
                torch.tensor([pad([1] * len(row), 0) for row in rows]),
                torch.tensor([pad(row, -100) for row in labels]),
                padding=0,
            )
            longest = max(p for p, _ in lengths)
            expected = [[0] * (longest - p) + row[:p] for row, (p, _) in zip(rows, lengths, strict=True)]
            assert ids.tolist() == expected
            assert mask.tolist() == [[0] * (longest - p) + [1] * p for p, _ in lengths]


def test_token_metrics_by_their_definition() -> None:
    """Perplexity and accuracy over all judged tokens, in float64 and one token at a time, over uneven batches."""
    generator = torch.Generator().manual_seed(0)
    parts, losses, right = [], [], []
    for rows, tokens in ((3, 7), (2, 4)):
        logits = torch.randn(rows, tokens, 11, generator=generator)
        labels = torch.randint(0, 11, (rows, tokens), generator=generator)
        labels[torch.rand(rows, tokens, generator=generator) < 0.5] = -100
        parts.append(token_scores((logits, "states"), labels))
        for row in range(rows):
            for t in range(tokens - 1):
                if (truth := int(labels[row, t + 1])) != -100:
                    logs = torch.log_softmax(logits[row, t].double(), 0)
                    losses.append(-float(logs[truth]))
                    right.append(int(logs.argmax()) == truth)
    found = token_metrics(EvalPrediction(predictions=torch.cat(parts).numpy(), label_ids=np.zeros(5)))
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert found["mean_token_accuracy"] == pytest.approx(sum(right) / len(right))


def test_final_numbers_of_all_of_gsm8k_as_its_own_script_reads_them(data_dir: Path) -> None:
    lines = (data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 1319
    for row in rows:
        official = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])
        assert official is not None
        assert final_number(row["answer"]) == official.group(1).replace(",", "")
    spaced = {"# # # # - 1, 000": "-1000", "####7.50 dollars": "7.50", "### 7": None, "#### none 3": None}
    assert {text: final_number(text) for text in spaced} == spaced


def test_gsm8k_is_judged_by_the_number_that_is_generated(data_dir: Path, loaded: LoadedModel) -> None:
    task = load_task("gsm8k", data_dir=data_dir, max_train_samples=9, max_eval_samples=5, max_target_length=30)
    parts = task.prepare(loaded, 512)
    assert (task.metric, parts.trainer) == ("exact_match", PromptTrainer)
    assert parts.training["generation_max_length"] == 30
    assert all(row.startswith("Question: ") and row.endswith("\nAnswer:") for row in task.train["prompt"])
    encoded = loaded.tokenizer(list(task.validation["completion"]), padding=True, return_tensors="np")["input_ids"]
    right = np.where(encoded == 0, -100, encoded)
    scores = np.array([[3.0, 0, 1]] * 2 + [[2.0, 1, 4]] * 3)
    judged = {"exact_match": 1.0, "loss": pytest.approx(12 / 14)}
    assert parts.compute_metrics(EvalPrediction(predictions=(right, scores), label_ids=right)) == judged
    wrong = right.copy()
    wrong[0] = -100  # no number at all
    wrong[1] = right[0]  # another one
    assert final_number(task.validation["completion"][0]) != final_number(task.validation["completion"][1])
    found = parts.compute_metrics(EvalPrediction(predictions=(wrong, scores), label_ids=right))
    assert found == {**judged, "exact_match": 0.6}


def test_rows_whose_prompts_leave_no_room(
    tmp_path: Path, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a " * 30, "completion": "b"}
    mixed, fine = write(tmp_path / "mixed.jsonl", short, long), write(tmp_path / "fine.jsonl", short)
    with caplog.at_level(logging.WARNING, logger="weightlora"):
        assert len(load(mixed, validation_file=fine).prepare(loaded, 20).train) == 1
    assert "1 of 2 training rows are left out: their prompts fill max_length=20" in caplog.text
    with pytest.raises(ConfigError, match="1 of 2 validation prompts leave no room"):
        load(fine, validation_file=mixed).prepare(loaded, 20)
    with pytest.raises(ConfigError, match="max_length=1 leaves no prompt room"):
        load(fine, validation_file=fine).prepare(loaded, 1)


def test_an_empty_completion_teaches_to_end(
    tmp_path: Path, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """One such row among 300 of a public instruction set is an example, not a fault; it is counted."""
    own = [{"prompt": f"the color {n} is", "completion": "deep blue" if n % 4 else " " * n} for n in range(8)]
    talks = [{"messages": chat(f"color {n}", "blue" if n else "")} for n in range(3)]
    files = [write(tmp_path / name, *rows) for name, rows in (("a.jsonl", own), ("b.jsonl", talks))]
    loaded.tokenizer.chat_template = CHATML
    plain, talked = (learned(load(file, validation_file=file), loaded) for file in files)
    assert [teach for _, teach in plain] == ["deep blue [SEP]" if n % 4 else "[SEP]" for n in range(8)]
    assert [teach for _, teach in talked] == ["< end >", "blue < end >", "blue < end >"]
    assert f"{files[0]}: 2 of 8 completions are empty: there the model learns to end at once" in caplog.text
    assert f"{files[1]}: 1 of 3 completions are empty" in caplog.text


GOOD, TALK = {"prompt": "p", "completion": "c"}, {"messages": chat("u", "a")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((GOOD, '{"prompt": "p"'), "broken JSON"),
        ((GOOD, "[1]"), "a list, not an object"),
        ((GOOD, {"prompt": "p"}), "no column 'completion'; there are: 'prompt'; a row is"),
        ((GOOD, {"prompt": "p", "completion": 3}), "column 'completion' holds 3, not text"),
        ((GOOD, TALK), "no column 'prompt'"),
        ((TALK, GOOD), "no column 'messages'"),
        ((TALK, {"messages": "hello"}), "column 'messages' holds no list of messages"),
        ((TALK, {"messages": [{"role": "user"}]}), "a message is"),
        ((TALK, {"messages": [{"role": "teacher", "content": "x"}]}), "the role 'teacher' is not one of system, user"),
        ((TALK, {"messages": chat("u")}), "a chat needs a message before"),
        ((TALK, {"messages": chat("u", "a", "u")}), "a chat must end in one message of the assistant"),
        ((TALK, {"messages": chat("\ud800", "a")}), "half of a surrogate pair"),
        (
            (
                {"prompt": chat("u"), "completion": chat("u", "a")[1:]},
                {"prompt": chat("u"), "completion": chat("u", "a")},
            ),
            "a chat must end in one message of the assistant",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, rows: tuple[Any, ...], message: str) -> None:
    path = write(tmp_path / "own.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        load(path, validation_file=write(tmp_path / "v.jsonl", rows[0]))
    assert str(caught.value).startswith(f"{path}:2: "), caught.value
    assert message in str(caught.value)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"v.jsonl:1: a chat, unlike the training rows"):
        load(write(tmp_path / "own.jsonl", GOOD), validation_file=write(tmp_path / "v.jsonl", TALK))
    with pytest.raises(DataError, match=r"holding out 0.1 of 1 training rows leaves one side empty"):
        load(tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match="text_column belongs to task 'files'"):
        load(tmp_path / "own.jsonl", text_column="prompt")
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "gsm8k" / f"{split}.jsonl", {"question": "q", "answer": "about 3"})
    with pytest.raises(DataError, match=r"train.jsonl:1: the answer does not end in #### and a number"):
        load_task("gsm8k", data_dir=tmp_path)
    with pytest.raises(DataError, match="unknown task 'gsm8'; did you mean 'gsm8k'"):
        load_task("gsm8")


def test_the_hubs_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with the hub repository's layout, read by the same call."""
    files = "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in ("train", "test"))
    (tmp_path / "hub" / "main").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    for split, answer in (("train", "#### 1"), ("test", "no number")):
        write(tmp_path / "hub" / "main" / f"{split}.jsonl", {"question": split, "answer": answer})
    monkeypatch.setitem(SOURCES, "gsm8k", dataclasses.replace(SOURCES["gsm8k"], hub=str(tmp_path / "hub")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match=r"hub/test:1: the answer does not end in ####"):
        load_task("gsm8k")
    write(tmp_path / "hub" / "main" / "test.jsonl", {"question": "two", "answer": "#### 2"})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    task = load_task("gsm8k")
    assert (task.train["prompt"][0], task.validation["completion"][0]) == ("Question: train\nAnswer:", " #### 2")

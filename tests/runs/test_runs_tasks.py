"""``train`` on tasks beside classification: the record's numbers again with stock PEFT, without trainer or batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from rouge_score import rouge_scorer
from safetensors.torch import load_file
from tests.builders import long
from tests.runs.commands import copy_data, read, read_rows, tree, weightlora, write_rows
from tests.runs.killer import Killer, differences, outcome, saved_before
from tests.tasks.test_tasks_completions import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer, BartForConditionalGeneration

from weightlora.runs import progress
from weightlora.tasks import LoadedModel, load_model, text_metrics

# Why this PEFT puts no adapters on BART's summarizer; "" where it does.
NO_SUMMARIZER = (
    "PEFT 0.20 WRAPS NO SUMMARIZER of this Transformers: only its refusal is tested"
    if peft.__version__.startswith("0.20.")
    and not hasattr(BartForConditionalGeneration, "_prepare_encoder_decoder_kwargs_for_generation")
    else ""
)

HEADS = {"squad": "question-answering", "squad_v2": "question-answering", "xsum": "seq2seq-lm"}
HEADS |= {"cnn_dailymail": "seq2seq-lm"}
COMMON = ("--max-steps", "6", "--per-device-train-batch-size", "4", "--learning-rate", "5e-3", "--logging-steps", "1")
SEAM = ("--method", "weightlora", "--k", "3", "--select-after", "2")


@pytest.fixture(scope="module")
def text_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the text tasks; of GSM8K's questions the beginning."""
    folder = copy_data(data_dir, tmp_path_factory.mktemp("text"), ("squad", "squad_v2", "xsum", "cnn_dailymail"))
    for task, count in (("squad", 16), ("squad_v2", 16), ("xsum", 6), ("cnn_dailymail", 6)):
        path = folder / task / "validation.jsonl"
        write_rows(path, read_rows(path)[:count])
    (folder / "gsm8k").mkdir()
    for split, count in (("train", 40), ("test", 6)):
        lines = (data_dir / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        short = [{**row, "question": row["question"][:60]} for row in rows]
        write_rows(folder / "gsm8k" / f"{split}.jsonl", short)
    return folder


def train(out: Path, *words: object) -> dict[str, Any]:
    assert weightlora("train", *words, "--out", out) == 0
    record: dict[str, Any] = read(out / "record.json")
    assert record["status"] == "ok"
    assert math.isfinite(record["metrics"]["eval_loss"])
    return record


def reopened(run: Path, shape: str, head: Any) -> tuple[Any, LoadedModel]:
    """The adapter on a fresh base, by stock PEFT."""
    loaded = load_model(shape, head=head)
    return PeftModel.from_pretrained(loaded.model, run / "adapter").eval(), loaded


def answer(model: Any, loaded: LoadedModel, row: dict[str, Any], length: int, stride: int, second: bool) -> str:
    """One question, its windows one at a time, every span tried."""
    encoded = loaded.tokenizer(
        row["question"].strip(), row["context"], truncation="only_second", max_length=length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    best, null = (-math.inf, ""), math.inf
    for number, ids in enumerate(encoded["input_ids"]):
        inputs = {name: torch.tensor([encoded[name][number]]) for name in loaded.tokenizer.model_input_names}
        with torch.no_grad():
            output = model(**inputs)
        start, end = output.start_logits[0].double(), output.end_logits[0].double()
        null = min(null, float(start[0] + end[0]))
        inside = [t for t in range(len(ids)) if encoded.sequence_ids(number)[t] == 1]
        offsets = encoded["offset_mapping"][number]
        for i in inside:
            for j in range(i, min(i + 30, inside[-1] + 1)):
                score = float(start[i] + end[j])
                if score > best[0]:
                    best = score, row["context"][offsets[i][0] : offsets[j][1]]
    return "" if second and null - best[0] > 0 else best[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "shape"), [("squad_v2", "bert-tiny-shape"), *long(("squad", "deberta-v3-small-shape"))]
)
def test_squad_runs_and_its_numbers_are_true(text_data: Path, tmp_path: Path, task: str, shape: str) -> None:
    window = ("--max-length", "96", "--doc-stride", "24")
    flags = ("--task", task, "--data-dir", text_data, "--model", shape, *window, *SEAM, *COMMON)
    record = train(tmp_path / "run", *flags)
    assert (record["metric"], record["seam_step"], len(record["kept"])) == ("f1", 2, 3)
    config = read(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])
    model, loaded = reopened(tmp_path / "run", shape, HEADS[task])
    rows = read_rows(text_data / task / "validation.jsonl")
    said = {row["id"]: answer(model, loaded, row, 96, 24, task == "squad_v2") for row in rows}
    truth = getattr(text_metrics, task)(said, {row["id"]: row["answers"]["text"] for row in rows})
    assert {name: record["metrics"][name] for name in truth} == pytest.approx(truth)
    assert weightlora("export", tmp_path / "run", "--profile", "merged", "--out", tmp_path / "merged") == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["xsum", *long("cnn_dailymail")])
def test_summaries_are_generated_and_judged(text_data: Path, tmp_path: Path, task: str) -> None:
    text, summary = {"xsum": ("document", "summary"), "cnn_dailymail": ("article", "highlights")}[task]
    (tmp_path / task).mkdir()
    for split in ("train", "validation"):
        # Real texts; summaries that begin alike, so that a small model can learn to say something that is asked for.
        rows = read_rows(text_data / task / f"{split}.jsonl")
        easy = [{**row, summary: f"the police said that {row[summary][:20]}"} for row in rows]
        write_rows(tmp_path / task / f"{split}.jsonl", easy)
    lengths = ("--max-length", "64", "--max-target-length", "12", "--generation-num-beams", "3")
    flags = ("--task", task, "--data-dir", tmp_path, "--model", "bart-small-shape", *COMMON, *lengths)
    record = train(tmp_path / "run", *flags, "--method", "full", "--max-steps", "60")
    base = load_model("bart-small-shape", head="seq2seq-lm")
    model = type(base.model).from_pretrained(tmp_path / "run" / "model").eval()
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = []
    for row in read_rows(tmp_path / task / "validation.jsonl"):
        inputs = base.tokenizer(row[text], truncation=True, max_length=64, return_tensors="pt")
        ids = model.generate(**inputs, num_beams=3, max_length=12)[0]
        scores.append(scorer.score(row[summary], base.tokenizer.decode(ids, skip_special_tokens=True)))
    for kind in ("rouge1", "rouge2", "rougeL"):
        mean = sum(score[kind].fmeasure for score in scores) / len(scores)
        assert record["metrics"][kind] == pytest.approx(mean)
    assert record["metrics"]["rouge1"] > 0.1, "something was generated that was asked for"


def test_a_summarizers_adapter_is_plain_and_portable(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVALUATION_EVERY", 0.0)  # as if it took long
    lengths = (
        "--max-length",
        "32",
        "--max-target-length",
        "8",
        "--generation-num-beams",
        "2",
        "--per-device-eval-batch-size",
        "2",
    )
    flags = ("--task", "xsum", "--data-dir", text_data, "--model", "bart-small-shape", *lengths, *SEAM, *COMMON)
    if NO_SUMMARIZER:
        assert weightlora("train", *flags, "--out", tmp_path / "run") == 2
        assert "cannot wrap BartForConditionalGeneration of the installed" in capsys.readouterr().err
        pytest.skip(NO_SUMMARIZER)
    record = train(tmp_path / "run", *flags)
    assert (record["metric"], len(record["kept"]), record["n_adapters"]) == ("rouge1", 3, 32)
    config = read(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_2_SEQ_LM", None)
    assert "weightlora on xsum: evaluating, batch 2/3  about " in capsys.readouterr().err
    assert weightlora("export", tmp_path / "run", "--profile", "portable", "--out", tmp_path / "served") == 0


@pytest.mark.long
def test_gsm8k_is_learned_where_it_can_be_and_judged_by_generation(text_data: Path, tmp_path: Path) -> None:
    """Every question has the same answer but in one of four validation rows: all weights learn it, 3 of 4 are right."""
    rows = read_rows(text_data / "gsm8k" / "train.jsonl")
    easy = [{"question": row["question"], "answer": "#### 7"} for row in rows]
    (tmp_path / "gsm8k").mkdir()
    write_rows(tmp_path / "gsm8k" / "train.jsonl", easy)
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [*easy[:3], {**easy[3], "answer": "#### 8"}])
    lengths = ("--max-length", "48", "--max-target-length", "16", "--max-steps", "100", "--learning-rate", "1e-2")
    flags = ("--task", "gsm8k", "--data-dir", tmp_path, "--model", "llama-small-shape", *COMMON, *lengths)
    record = train(tmp_path / "run", *flags, "--method", "full")
    assert (record["metric"], record["metrics"]["exact_match"]) == ("exact_match", 0.75)


@pytest.mark.long
def test_gsm8k_runs_on_real_rows_with_a_seam(text_data: Path, tmp_path: Path) -> None:
    flags = ("--task", "gsm8k", "--data-dir", text_data, "--model", "llama-small-shape", "--max-target-length", "8")
    record = train(tmp_path / "run", *flags, *SEAM, *COMMON, "--max-length", "128", "--max-eval-samples", "4")
    assert record["metrics"]["exact_match"] == 0.0
    assert read(tmp_path / "run" / "adapter" / "adapter_config.json")["task_type"] == "CAUSAL_LM"
    assert weightlora("export", tmp_path / "run", "--profile", "portable", "--out", tmp_path / "served") == 0


def test_the_gradient_of_a_batch_does_not_depend_on_its_split(text_data: Path, tmp_path: Path) -> None:
    """Completions differ in length: the mean is over the tokens of the whole batch, however it is cut."""
    flags = ("--task", "gsm8k", "--data-dir", text_data, "--model", "llama-small-shape", "--max-target-length", "4")
    flags += ("--method", "lora", "--dropout", "0", "--max-length", "128", "--max-eval-samples", "2", *COMMON)
    for name, size in (("whole", "4"), ("cut", "1")):
        train(tmp_path / name, *flags, "--max-steps", "3", "--micro-batch", size)
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, cut[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A folder with a small Llama whose tokenizer has a chat template."""
    loaded = load_model("llama-small-shape", head="causal-lm")
    loaded.tokenizer.chat_template = CHATML
    loaded.model.save_pretrained(tmp_path / "chat")
    loaded.tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_a_file_of_chats_runs_and_its_perplexity_is_true(text_data: Path, tmp_path: Path, chat_model: Path) -> None:
    rows = read_rows(text_data / "gsm8k" / "train.jsonl")
    chats = [
        {
            "messages": [
                {"role": role, "content": row[key][:90]}
                for role, key in (("user", "question"), ("assistant", "answer"))
            ]
        }
        for row in rows
    ]
    own = write_rows(tmp_path / "own.jsonl", chats)
    flags = ("--task", own, "--model", chat_model, "--max-length", "96", *SEAM, *COMMON)
    record = train(tmp_path / "run", *flags, "--validation-file", write_rows(tmp_path / "v.jsonl", chats[:5]))
    assert (record["task"], record["metric"]) == (str(own), "mean_token_accuracy")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(chat_model), tmp_path / "run" / "adapter"
    ).eval()
    total, right, count = 0.0, 0, 0
    for row in chats[:5]:
        user, said = (message["content"] for message in row["messages"])
        prompt, completion = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"<user> {user} <end><assistant> ", f"{said} <end>")
        )
        ids = torch.tensor([(prompt + completion)[:96]])
        with torch.no_grad():
            logs = torch.log_softmax(model(ids).logits[0].double(), -1)
        for t in range(len(prompt), ids.shape[1]):
            truth = int(ids[0, t])
            total -= float(logs[t - 1, truth])
            right += int(logs[t - 1].argmax()) == truth
            count += 1
    assert record["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["metrics"]["mean_token_accuracy"] == pytest.approx(right / count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "shape", "step"),
    [
        *long(("squad_v2", "bert-tiny-shape", 3), ("xsum", "bart-small-shape", 2)),
        ("gsm8k", "llama-small-shape", 5),
    ],
)
def test_killed_before_at_and_after_the_seam_it_ends_the_same(
    killer: Killer, text_data: Path, tmp_path: Path, task: str, shape: str, step: int
) -> None:
    if NO_SUMMARIZER and task == "xsum":
        pytest.skip(NO_SUMMARIZER)
    flags = ["--task", task, "--data-dir", str(text_data), "--model", shape, "--save-steps", "2", *SEAM, *COMMON]
    flags += ["--select-after", "3", "--max-eval-samples", "4"]
    flags += ["--max-length", "64", *(["--doc-stride", "16"] if task == "squad_v2" else ["--max-target-length", "8"])]
    killer.life(tmp_path / "whole", flags, [])
    tries = killer.life(tmp_path / "killed", flags, [("step", step, 0.0)])
    events = tries[0]["events"]
    assert [one["events"].count("step") for one in tries] == [step, 6 - saved_before(events, len(events))]
    assert differences(outcome(tmp_path / "killed"), outcome(tmp_path / "whole")) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "xsum"), "model 'bert-tiny-shape' has no seq2seq-lm head; pass bart-small-shape"),
        (
            ("--task", "squad", "--generation-num-beams", "2"),
            "generation_num_beams is set, but task 'squad' generates no",
        ),
        (("--task", "squad", "--train-sampling-strategy", "group_by_length"), "group_by_length reorders evaluation"),
        (("--task", "squad", "--max-target-length", "9"), "max_target_length belongs to task"),
        (("--task", "squad", "--max-length", "40"), "leaves"),
        (("--task", "no-such.jsonl"), "no-such.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    words = ("--data-dir", text_data, "--model", "bert-tiny-shape", *COMMON, "--out", tmp_path / "run")
    assert weightlora("train", *flags, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert tree(tmp_path) == {}

"""``train``: every method on every shape, and what it leaves behind, judged with stock PEFT and scikit-learn."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.metrics import f1_score
from tests.builders import long
from tests.runs.commands import TINY, read, read_rows, weightlora
from torch import Tensor
from transformers import AutoModelForSequenceClassification, set_seed

from weightlora.methods import METHODS
from weightlora.tasks import LoadedModel, load_model

COLUMNS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"), "stsb": ("sentence1", "sentence2")}
RECORD_KEYS = {
    *("schema_version", "status", "method", "preset", "task", "model", "seed", "k", "r", "n_adapters", "kept"),
    *("trainable_params", "metrics", "phases", "versions", "argv"),
}
PHASE_KEYS = {
    *("name", "steps", "seconds", "micro_batch", "kept_activation_bytes", "peak_memory_bytes", "flops_per_step"),
}
STEPS = 6
# Linear layers below the numbered blocks: all, and the query, key and value projections among them.
LINEARS = {"bert-tiny": (12, 6), "deberta-v2-small": (18, 9), "deberta-v3-small": (18, 9)}
LINEARS |= {"bart-small": (32, 18), "llama-small": (21, 9)}

RUNS = [
    ("bert-tiny", "weightlora", "recommended", "all-linear", "sst2", "0.25"),
    ("bert-tiny", "weightlora+", "official", "attention", "mrpc", "3"),
    ("bert-tiny", "full", "recommended", "all-linear", "stsb", "3"),
    ("deberta-v2-small", "top", "recommended", "all-linear", "sst2", "0.25"),
    ("deberta-v3-small", "gradient", "recommended", "all-linear", "mrpc", "0.25"),
    ("deberta-v3-small", "lora", "recommended", "attention", "sst2", "3"),
    ("bart-small", "weightlora+", "paper", "all-linear", "stsb", "0.25"),
    ("bart-small", "random", "recommended", "attention", "sst2", "3"),
    ("llama-small", "weightlora", "official", "all-linear", "mrpc", "3"),
]
MORE = [
    ("deberta-v2-small", "weightlora+", "recommended", "attention", "mrpc", "3"),
    ("deberta-v3-small", "weightlora", "paper", "attention", "stsb", "3"),
    ("llama-small", "top", "recommended", "attention", "stsb", "3"),
    ("llama-small", "lora", "recommended", "all-linear", "sst2", "0.25"),
]


def test_every_method_and_shape_is_covered() -> None:
    # Those that keep a number of adapters, and the two references; test_runs_budget.py runs every method there is.
    with_k = {name for name, kind in METHODS.items() if "k" in {field.name for field in dataclasses.fields(kind)}}
    with_k -= {"domlora", "kappatune"}  # in tests/methods/test_placements.py
    every = [*RUNS, *MORE]
    assert {run[1] for run in every} == with_k | {"lora", "full"}
    assert {run[0] for run in every} == set(LINEARS)
    assert {(run[0], run[3]) for run in every} == {(m, t) for m in LINEARS for t in ("all-linear", "attention")}


def fresh_base(model: str, task: str, **settings: Any) -> LoadedModel:
    """The same base as the run's, made without any of its code but the loader of models."""
    names = {"mrpc": ("not_equivalent", "equivalent"), "sst2": ("negative", "positive")}.get(task)
    set_seed(12345)  # whatever the surroundings drew before
    return load_model(model, num_labels=1 if names is None else 2, labels=names, regression=names is None, **settings)


@functools.cache
def validation(folder: Path, task: str) -> tuple[list[list[str]], np.ndarray]:
    rows = read_rows(folder / task / "validation.jsonl")
    return [[row[column] for row in rows] for column in COLUMNS[task]], np.array([row["label"] for row in rows])


def predict(model: torch.nn.Module, loaded: LoadedModel, texts: list[list[str]]) -> Tensor:
    """Logits, one example at a time: no padding, no batch, no trainer."""
    model.eval()
    with torch.no_grad():
        encoded = [
            loaded.tokenizer(*row, truncation="longest_first", max_length=24, return_tensors="pt")
            for row in zip(*texts, strict=True)
        ]
        return torch.cat([model(**dict(inputs)).logits for inputs in encoded])


def target_spread(folder: Path, task: str, shape: str) -> float:
    """Standard deviation of the training targets; their root mean square for a head without a bias (Llama's)."""
    targets = np.array([row["label"] for row in read_rows(folder / task / "train.jsonl")], dtype=float)
    return float(np.sqrt(np.mean(targets**2)) if shape == "llama-small" else targets.std())


def numbers(task: str, logits: Tensor, labels: np.ndarray, spread: float) -> dict[str, float]:
    """Loss and metrics of a task from its logits."""
    if task == "stsb":
        values = logits.squeeze(-1).double().numpy()
        # The loss is in units of the spread of the training targets.
        loss = float(np.mean((values - labels) ** 2)) / spread**2
        return {"pearson": pearsonr(values, labels).statistic, "eval_loss": loss}
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    classes = logits.argmax(-1).numpy()
    found = {"accuracy": float((classes == labels).mean()), "eval_loss": loss}
    return found | ({"f1": float(f1_score(labels, classes))} if task == "mrpc" else {})


def train(out: Path, data: Path, model: str, task: str, *flags: str) -> dict[str, Any]:
    tiny = [model if word == TINY[1] else word for word in TINY]
    steps = ("--max-steps", str(STEPS), "--learning-rate", "5e-3", "--logging-steps", "1")
    words = ("--task", task, "--data-dir", data, *tiny, *steps, *flags)
    assert weightlora("train", *words, "--out", out, "--json", f"{out}.json") == 0
    record: dict[str, Any] = read(out / "record.json")
    assert read(Path(f"{out}.json")) == record
    return record


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "method", "preset", "targets", "task", "k"), [*RUNS, *long(*MORE)])
def test_train_leaves_a_true_record_and_a_stock_adapter(
    small_data: Path, tmp_path: Path, shape: str, method: str, preset: str, targets: str, task: str, k: str
) -> None:
    run, model = tmp_path / "deep" / "run", f"{shape}-shape"
    flags = ["--method", method, "--preset", preset, "--targets", targets, "--k", k]
    flags += ["--select-after", "3"] if method.startswith("weightlora") else []
    flags += ["--max-steps", "10"] if method == "gradient" else []  # it looks at 8 batches first
    record = train(run, small_data, model, task, *flags)
    assert record.keys() >= RECORD_KEYS
    assert all(phase.keys() >= PHASE_KEYS for phase in record["phases"])
    assert (record["status"], record["method"]) == ("ok", method)
    named, _, changed = record["preset"].partition(", changed: ")
    assert (named, "select_after" in changed) == (preset, method.startswith("weightlora"))
    assert (record["task"], record["model"], record["seed"]) == (task, model, 0)

    loaded = fresh_base(model, task)
    live: torch.nn.Module
    if method == "full":
        assert (record["n_adapters"], record["kept"], record["k"]) == (0, [], None)
        live = AutoModelForSequenceClassification.from_pretrained(run / "model")
        size = sum(p.numel() for p in live.parameters())
        assert record["trainable_params"] == {"warmup": size, "final": size}
    else:
        check_selection(record, run, LINEARS[shape][targets == "attention"], method, k)
        live = PeftModel.from_pretrained(loaded.model, run / "adapter")
    texts, labels = validation(small_data, task)
    truth = numbers(task, predict(live, loaded, texts), labels, target_spread(small_data, task, shape))
    for name, value in truth.items():
        # The predictions of an untrained model hardly differ, which makes their correlation a delicate number.
        tolerance = 1e-3 if name == "pearson" else 1e-5
        assert math.isclose(record["metrics"][name], value, rel_tol=tolerance), name
    assert sum(phase["steps"] for phase in record["phases"]) == record["max_steps"]


def check_selection(record: dict[str, Any], run: Path, n: int, method: str, k: str) -> None:
    """Kept modules, their number, ranks and parameters: the record against the files."""
    wanted = n if method == "lora" else math.floor(n * 0.25 + 0.5) if k == "0.25" else 3
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert (record["n_adapters"], record["k"], record["r"]) == (n, wanted, 8)
    assert len(record["kept"]) == wanted
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in weights.items()
        if "lora_A" in name
    }
    assert {kept["name"]: kept["rank"] for kept in record["kept"]} == ranks
    assert [a["name"] for a in record["adapters"] if a["kept"]] == [kept["name"] for kept in record["kept"]]
    assert record["trainable_params"]["final"] == sum(tensor.numel() for tensor in weights.values())
    warmup, final = record["trainable_params"]["warmup"], record["trainable_params"]["final"]
    if method == "weightlora+":
        assert min(ranks.values()) > 8, "the survivors have grown"
        assert final <= warmup
    elif method in ("weightlora", "gradient") and not record["preset"].startswith("official"):
        assert final < warmup
    assert (run / "selection.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (run / "selection.png").stat().st_size > 5000
    chosen = read(run / "selection.json")
    assert [c["name"] for c in chosen["choices"] if c["kept"]] == [kept["name"] for kept in record["kept"]]


def test_the_deepest_adapters_keep_fewer_bytes_and_cost_fewer_operations(small_data: Path, tmp_path: Path) -> None:
    flags = ("--method", "top", "--targets", "attention", "--dropout", "0")
    few = train(tmp_path / "few", small_data, "deberta-v3-small-shape", "sst2", *flags, "--k", "3")
    every = train(tmp_path / "every", small_data, "deberta-v3-small-shape", "sst2", *flags, "--k", "9")
    (few_phase,), (all_phase,) = few["phases"], every["phases"]
    assert [kept["name"].split(".")[3] for kept in few["kept"]] == ["2"] * 3
    # One block of three is in the backward pass, instead of all.
    assert few_phase["kept_activation_bytes"] < 0.6 * all_phase["kept_activation_bytes"]
    assert few_phase["flops_per_step"] < 0.9 * all_phase["flops_per_step"]


def test_after_the_seam_less_is_kept_when_only_the_top_lives(small_data: Path, tmp_path: Path) -> None:
    """The same within one run: warm-up is paid for all adapters, what follows for the survivors."""
    flags = ("--method", "weightlora", "--targets", "attention", "--select-after", "2", "--k", "1", "--seed", "3")
    record = train(tmp_path / "run", small_data, "deberta-v3-small-shape", "sst2", *flags)
    warmup, final = record["phases"]
    assert [phase["name"] for phase in (warmup, final)] == ["warmup", "final"]
    assert (warmup["steps"], final["steps"], record["seam_step"]) == (2, 4, 2)
    assert final["kept_activation_bytes"] < warmup["kept_activation_bytes"]
    assert final["flops_per_step"] < warmup["flops_per_step"]


def test_the_micro_batch_may_change_at_the_seam_and_the_steps_stay(small_data: Path, tmp_path: Path) -> None:
    flags = ("--k", "3", "--select-after", "2", "--micro-batch", "2", "--final-micro-batch", "8")
    record = train(tmp_path / "run", small_data, "bert-tiny-shape", "sst2", *flags)
    assert [(p["micro_batch"], p["accumulation"], p["steps"]) for p in record["phases"]] == [(2, 4, 2), (8, 1, 4)]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(small_data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        set_seed(hash(name) % 1000)  # the state of the process must not matter
        train(tmp_path / name, small_data, "bert-tiny-shape", "sst2", "--k", "3", "--select-after", "2", "--seed", seed)
    a, b, c = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_users_own_csv_pairs_and_a_number_to_predict(tmp_path: Path) -> None:
    lines = ["left,right,how_close"] + [f"text {i % 7},other {i % 5},{i % 5 / 2}" for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--train-file", tmp_path / "own.csv", "--text-column", "left", "--pair-column", "right", "--regression"]
    flags += ["--label-column", "how_close", "--max-steps", "4", "--k", "2", "--select-after", "2"]
    assert weightlora("train", "--task", "files", *flags, *TINY, "--out", tmp_path / "run") == 0
    record = read(tmp_path / "run" / "record.json")
    assert record["metric"] == "pearson"
    assert record["metrics"]["pearson"] >= -1
    head = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert head.shape[0] == 1


def test_training_that_breaks_down_is_a_failed_run(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real breakdown: every gate is trained into the negative, and the rule lets only positive ones live."""
    run = tmp_path / "run"
    flags = ["--method", "weightlora", "--preset", "paper", "--k", "3", "--select-after", "3", "--max-steps", "4"]
    settings = tmp_path / "recipe.yaml"
    settings.write_text(f"task: sst2\ndata_dir: {small_data}\ngate_lr: 1e30\nlearning_rate: 1e30\n", encoding="utf-8")
    assert weightlora("train", settings, *flags, *TINY, "--out", run) == 1
    record = read(run / "record.json")
    assert record["status"] == "failed"
    assert record["error"]
    assert "Traceback" in (run / "error.txt").read_text(encoding="utf-8")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("weightlora: the run failed: ")
    assert record["error"] in last

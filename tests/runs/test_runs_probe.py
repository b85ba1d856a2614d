"""``probe``: its products against dense gradients under stock PEFT, its stars against ``select``, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.runs.commands import TINY, read, read_rows, spec, tree, weightlora
from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.runs.figure_specs import ProbeSpec
from weightlora.tasks import load_model

T = 4
# A constant learning rate: then the first T steps of a longer run are those of a run of T steps.
FLAGS = (
    *TINY,
    "--learning-rate",
    "3e-2",
    "--lr-scheduler-type",
    "constant",
    "--warmup-steps",
    "0",
    "--task",
    "sst2",
)
PROBE = ("probe", *FLAGS, "--k", "3", "--select-after", T, "--max-steps", 3 * T)


def dense_products(adapter: Path, data: Path, seed: int, model: str) -> dict[str, float]:
    """``<dL/dW, s B A>`` by the gradient of every base weight, over all training rows, one row at a time."""
    names = ("negative", "positive")
    loaded = load_model(model, num_labels=2, labels=names, seed=seed)
    tuned: Any = PeftModel.from_pretrained(loaded.model, adapter)
    tuned.eval()
    layers = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "lora_A")}
    weights: list[Tensor] = [layer.get_base_layer().weight.requires_grad_() for layer in layers.values()]
    rows = read_rows(data / "sst2" / "train.jsonl")
    for row in rows:
        encoded = loaded.tokenizer(row["sentence"], truncation=True, max_length=24, return_tensors="pt")
        (tuned(**encoded, labels=torch.tensor([row["label"]])).loss / len(rows)).backward()
    return {
        name: float((weight.grad * layer.get_delta_weight("default")).sum())
        for (name, layer), weight in zip(layers.items(), weights, strict=True)
    }


@pytest.fixture(scope="module")
def probed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    words = (*PROBE, "--data-dir", small_data, "--seeds", "0,7")
    assert weightlora(*words, "--out", out, "--json", out.with_suffix(".json")) == 0
    return out


def test_products_of_one_run_are_those_of_the_dense_gradient(probed: Path, small_data: Path, tmp_path: Path) -> None:
    data = read(probed / "probe.json")
    assert data == read(probed.with_suffix(".json"))
    assert (data["mode"], data["task"], data["model"], data["steps"]) == ("cheap", "sst2", "bert-tiny-shape", T)
    assert (probed / "probe.png").stat().st_size > 10_000
    for entry in data["seeds"]:
        run = tmp_path / f"run-{entry['seed']}"
        words = ("train", *FLAGS, "--data-dir", small_data, "--method", "lora", "--seed", entry["seed"])
        assert weightlora(*words, "--max-steps", T, "--out", run) == 0
        dense = dense_products(run / "adapter", small_data, entry["seed"], "bert-tiny-shape")
        assert [adapter["name"] for adapter in data["adapters"]] == list(dense)
        assert entry["products"] == pytest.approx(list(dense.values()), rel=2e-3, abs=1e-7)
        assert max(map(abs, entry["products"])) > 1e-4


def test_products_one_at_a_time_are_those_of_that_adapter_alone(small_data: Path, tmp_path: Path) -> None:
    words = (*PROBE, "--data-dir", small_data, "--seeds", "1", "--targets", "query,value", "--mode", "paper")
    assert weightlora(*words, "--k", 1, "--out", tmp_path / "out") == 0
    data = read(tmp_path / "out" / "probe.json")
    assert (data["mode"], len(data["adapters"])) == ("paper", 4)
    for index in (0, 3):
        name, run = data["adapters"][index]["name"], tmp_path / f"run-{index}"
        words = ("train", *FLAGS, "--data-dir", small_data, "--method", "lora", "--targets", name, "--seed", 1)
        assert weightlora(*words, "--max-steps", T, "--out", run) == 0
        (dense,) = dense_products(run / "adapter", small_data, 1, "bert-tiny-shape").values()
        assert data["seeds"][0]["products"][index] == pytest.approx(dense, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_the_stars_are_what_select_selects(small_data: Path, tmp_path: Path, preset: str) -> None:
    words = (*PROBE[1:], "--preset", preset, "--data-dir", small_data)
    assert weightlora("probe", *words, "--seeds", "3", "--out", tmp_path / "out") == 0
    assert weightlora("select", *words, "--seed", "3", "--out", tmp_path / "chosen") == 0
    chosen = read(tmp_path / "chosen" / "selection.json")["choices"]
    (entry,) = read(tmp_path / "out" / "probe.json")["seeds"]
    assert entry["selected"] == [choice["name"] for choice in chosen if choice["kept"]]
    assert all(isinstance(product, float) for product in entry["products"])


def test_a_probe_goes_on_with_the_seeds_that_are_missing(
    probed: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*PROBE, "--data-dir", small_data)
    assert weightlora(*words, "--seeds", "7", "--out", tmp_path / "out") == 0
    assert weightlora(*words, "--seeds", "0,7", "--out", tmp_path / "out") == 0
    assert "seed 7 is there already" in capsys.readouterr().err
    whole, again = read(probed / "probe.json"), read(tmp_path / "out" / "probe.json")
    assert again["seeds"] == whole["seeds"]
    assert again["adapters"] == whole["adapters"]
    before = tree(tmp_path / "out")
    assert weightlora(*words, "--seeds", "0", "--gradient-rows", "9", "--out", tmp_path / "out") == 2
    assert "holds a probe with other settings" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "probe.json").write_text("{")
    assert weightlora(*words, "--seeds", "0", "--out", tmp_path / "out") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "1,1"), "must be different numbers"),
        (("--gradient-rows", "0"), "gradient_rows=0"),
        (("--mode", "dear"), "invalid choice: 'dear'"),
        (("--select-after", "99"), "use at most"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    flags: tuple[str, ...], message: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weightlora(*PROBE, "--data-dir", small_data, *flags, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_what_selects_with_weightlora_can_be_probed() -> None:
    with pytest.raises(ConfigError, match="it takes no method 'random'"):
        ProbeSpec(run=spec(method="random"))


def test_a_pretrained_model_is_probed(small_data: Path, tmp_path: Path) -> None:
    words = [w if w != "bert-tiny-shape" else "minilm" for w in map(str, PROBE)]
    flags = ("--targets", "attention", "--seeds", "0", "--gradient-rows", "16", "--select-after", "2")
    assert weightlora(*words, "--data-dir", small_data, *flags, "--out", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [a["block"] for a in data["adapters"]] == [i // 3 for i in range(18)]
    assert len(data["seeds"][0]["selected"]) == 3

"""The planner: closed forms against real tensors and optimizers, plans against counted bytes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainingArguments

from weightlora.core.sizes import format_bytes, parse_bytes
from weightlora.cost import PlanConfig, Planner, divisors
from weightlora.cost.measure import kept_bytes
from weightlora.cost.plan_text import plan_text
from weightlora.cost.tensors import (
    optimizer_bytes,
    shapes_of,
    tensor_bytes,
    weight_bytes,
)
from weightlora.errors import ConfigError, PlanError, WeightLoRAError
from weightlora.graft.adapters import adapters
from weightlora.graft.fast import fast_path
from weightlora.graft.surgery import disconnect
from weightlora.runs.plan import adapted, calibrate, loss_of, planner_for

SHAPES = ("bert-tiny-shape", "deberta-v3-small-shape", "bart-small-shape", "llama-small-shape")
SMALL = PlanConfig(model="bert-tiny-shape", length=16, batch=12, device="cpu", k=3)


@cache
def planner(config: PlanConfig = SMALL) -> Planner:
    return planner_for(config)


def real(config: PlanConfig) -> tuple[Any, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapted(config, "cpu")


@given(number=st.integers(1, 10**6), unit=st.sampled_from([("KiB", 2**10), ("MB", 10**6), ("GiB", 2**30), ("", 1)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == parse_bytes(f" {number} {unit[0].lower()} ") == number * unit[1]
    assert parse_bytes(number) == number


@pytest.mark.parametrize("text", ["", "16 apples", "-3GiB", "GiB", "0MiB", "1e3", "16GiBB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="16GiB, 12GB or 800MiB"):
        parse_bytes(text)


def real_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of everything the optimizer holds."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    # Transformers' Adafactor keeps a number per tensor that is a tensor after its first step.
    return sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"])
@pytest.mark.parametrize("shape", ["bert-tiny-shape", "llama-small-shape"])
def test_optimizer_state_to_the_byte(tmp_path: Path, name: str, shape: str) -> None:
    config = replace(SMALL, model=shape)
    bones, model = real(config)
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, report_to="none", use_cpu=True)
    optimizer = Trainer(model=model, args=args).create_optimizer()
    model(**bones.batch(2, 16)).loss.backward()
    optimizer.step()
    assert optimizer_bytes(name, shapes_of([p for p in model.parameters() if p.requires_grad])) == real_state(optimizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_gradients_to_the_byte(shape: str, dtype: str) -> None:
    """Against the real model after its backward pass."""
    config = replace(SMALL, model=shape, dtype=dtype)
    bones, model = real(config)
    model(**bones.batch(2, 16)).loss.backward()
    parts = planner(config).estimate.cost(planner(config).warmup(), 2)
    everything = [*model.parameters(), *model.buffers()]
    assert parts.weights + parts.adapters + parts.heads == tensor_bytes(everything)
    assert parts.gradients == sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )
    found = planner(config).estimate.trainable_params(planner(config).warmup())
    assert found - planner(config).n == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_of_any_micro_batch(shape: str, micro_batch: int, autocast: bool) -> None:
    config = replace(SMALL, model=shape, autocast=autocast)
    estimate = planner(config).estimate
    live = planner(config).trace.dearest(3, 1)
    bones, model = real(config)
    names = [a.name for a in adapters(model)]
    disconnect(model, [name for i, name in enumerate(names) if i not in live])
    fast_path(model)
    kept = kept_bytes(model, loss_of(model, bones.batch(micro_batch, config.length), autocast))
    assert estimate.activations(planner(config).final(live), micro_batch) == pytest.approx(kept, rel=0.01)


def test_sets_of_survivors() -> None:
    """The deepest K are the cheapest, and the dearest are as dear as any of a hundred sets drawn at random."""
    trace, n = planner().trace, planner().n
    draw = torch.Generator().manual_seed(0)
    for k in (1, 3, 6):
        drawn = [torch.randperm(n, generator=draw)[:k].tolist() for _ in range(100)]
        kept = [trace.kept(live) for live in drawn]
        assert trace.kept(trace.deepest(k)) <= min(kept)
        assert trace.kept(trace.dearest(k)) >= max(kept)
        assert len(trace.dearest(k)) == len(trace.deepest(k)) == k


@settings(max_examples=30, deadline=None, derandomize=True)
@given(memory=st.integers(2**20, 2**26), batch=st.sampled_from([1, 6, 16]))
def test_the_largest_micro_batch(memory: int, batch: int) -> None:
    """Against trying every divisor."""
    estimate, phase = planner().estimate, planner().warmup()
    fits = [m for m in divisors(batch) if estimate.cost(phase, m).total <= memory]
    assert estimate.largest_micro_batch(phase, memory, batch) == (max(fits) if fits else None)


def test_a_plan_within_a_memory() -> None:
    whole = planner().plan()
    assert (whole.warmup.micro_batch, whole.final.micro_batch) == (12, 12)
    made = planner().plan(whole.warmup.total - 1)
    assert made.warmup.micro_batch < 12
    assert made.final.micro_batch >= made.warmup.micro_batch
    for phase in (made.warmup, made.final):
        assert phase.total <= whole.warmup.total - 1
        assert phase.micro_batch * phase.accumulation == 12
        assert sum(phase.layers.values()) + 4 * made.n * (phase.name == "warmup") == phase.kept_activation_bytes
    assert [row.k for row in made.by_k] == sorted({1, 2, 3, 4, 8, made.n})
    assert all(row.deepest <= row.dearest for row in made.by_k)
    lowest = [size for _, size in made.by_lowest]
    assert lowest == sorted(lowest, reverse=True)
    assert [row.warmup for row in made.by_r] == sorted(row.warmup for row in made.by_r)


def test_a_higher_lowest_survivor_takes_less() -> None:
    config = replace(SMALL, lowest=1)
    assert planner(config).plan().final.total < planner().plan().final.total
    assert planner(config).plan().final.lowest == "bert.encoder.layer.1"
    with pytest.raises(ConfigError, match="lowest=2 is not a block with adapters; use 0 to 1"):
        planner_for(replace(SMALL, lowest=2), traces=planner().traces)


def test_what_cannot_fit_is_refused_and_the_nearest_fits() -> None:
    """The setting that the message names is planned again, and does fit."""
    wide = replace(SMALL, length=128)
    least = planner(wide).estimate.cost(planner(wide).warmup(), 1).total
    with pytest.raises(PlanError, match=r"phase 'warmup' needs .* the nearest that fits is --") as refused:
        planner(wide).plan(int(0.97 * least))
    assert "\n" not in str(refused.value)
    words = str(refused.value).partition("the nearest that fits is ")[2].split(" (")[0].split()
    changes: dict[str, Any] = {}
    for position, word in enumerate(words):
        if word.startswith("--"):
            following = words[position + 1 : position + 2]
            plain = bool(following) and not following[0].startswith("--")
            changes[word[2:]] = following[0] if plain else True
    changes = {
        key: int(value) if isinstance(value, str) and value.isdigit() else value for key, value in changes.items()
    }
    assert planner_for(replace(wide, **changes)).plan(int(0.97 * least)).warmup.total <= int(0.97 * least)


def test_what_nothing_near_fits() -> None:
    with pytest.raises(PlanError, match="nothing near it fits: take a smaller model, or more memory"):
        planner().plan(1000)
    assert issubclass(PlanError, WeightLoRAError)


def test_checkpointing_takes_less_and_keeps_one_block() -> None:
    on = planner_for(replace(SMALL, checkpointing=True), traces=planner().traces)
    parts, plain = on.estimate.cost(on.warmup(), 6), planner().estimate.cost(planner().warmup(), 6)
    assert parts.activations < plain.activations / 3
    assert 0 < parts.recomputed < plain.activations
    assert parts.total < plain.total


@pytest.mark.parametrize(("name", "share"), [("8bit", 1 / 4), ("4bit", 1 / 8), ("4bit-double", 1 / 8)])
def test_quantised_weights(name: str, share: float) -> None:
    """Linear layers of the blocks shrink, the rest stays; scales cost a few percent."""
    _, model = adapted(SMALL)
    linear = [m for p, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in p and "lora_" not in p]
    before = tensor_bytes([m.weight for m in linear])
    saved = weight_bytes(model, None) - weight_bytes(model, name)
    assert before * (1 - share) * 0.9 < saved < before * (1 - share)


def test_json_and_text() -> None:
    made = planner().plan(2**30)
    data = json.loads(made.to_json())
    assert data["final"]["total"] == made.final.total == sum(data["final"]["parts"].values())
    assert data["config"]["model"] == "bert-tiny-shape"
    said = plan_text(made)
    assert format_bytes(made.warmup.total) in said
    assert all(len(line) <= 120 for line in said.splitlines())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_probe_counts_what_was_predicted(shape: str, checkpointing: bool) -> None:
    config = replace(SMALL, model=shape, checkpointing=checkpointing)
    found = calibrate(config, planner(config), "cpu", micro_batch=2)
    assert found.kind == "kept"
    assert found.measured == pytest.approx(found.predicted, rel=0.01)
    assert found.overhead == 0


def test_a_measured_overhead_is_added() -> None:
    more = planner_for(SMALL, 12345, planner().traces)
    assert more.plan().warmup.total == planner().plan().warmup.total + 12345


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "cuda", "torch finds no CUDA device"),
        ({"device": "cuda"}, "cpu", "is for the kernels of cuda"),
        ({"quantization": "4bit"}, "cpu", "random weights, which are not quantised"),
    ],
)
def test_a_probe_that_cannot_be(changes: dict[str, Any], device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("NO SUCH CASE: there is a CUDA device")
    with pytest.raises(ConfigError, match=message):
        calibrate(replace(SMALL, **changes), planner(), device)


def test_llama_3_8b_without_weights_in_ten_seconds() -> None:
    began = time.process_time()
    made = planner_for(PlanConfig(model="llama-3-8b", length=2048, batch=16, checkpointing=True)).plan(
        parse_bytes("40GiB")
    )
    spent = time.process_time() - began
    assert made.n == 224
    assert made.warmup.parts.weights == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert made.warmup.parts.adapters == 4 * 20_971_520  # r (d_in + d_out) over 7 targets of 32 layers
    assert spent < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r=0 is not allowed"),
        ({"k": 0}, "k=0"),
        ({"k": 99}, "use 1..12"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dtype": "int8"}, "use one of float32, bfloat16, float16"),
        ({"head": "lm"}, "use one of sequence-classification, question-answering, causal-lm, seq2seq-lm"),
        ({"optimizer": "lion"}, "use one of adamw_torch"),
        ({"quantization": "2bit"}, "use one of 8bit, 4bit"),
        ({"model": "nothing-like-it"}, "pass minilm"),
        ({"model": "./nowhere"}, "no such folder; pass a folder written by save_pretrained"),
        ({"targets": "wrong_proj"}, "no linear layer ends in 'wrong_proj'"),
        ({"model": "minilm", "head": "seq2seq-lm"}, "cannot be built with the head 'seq2seq-lm'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightLoRAError, match=message) as error:
        planner_for(replace(SMALL, **changes))
    assert "\n" not in str(error.value)


def test_a_folder_or_a_config_file_is_enough(tmp_path: Path) -> None:
    bones, _ = real(SMALL)
    bones.model.config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        made = planner_for(replace(SMALL, model=str(name))).plan()
        assert made.warmup.total == planner().plan().warmup.total


def test_state_of_each_adapter_adds_up() -> None:
    """What an exact search over placements charges per adapter."""
    estimate, phase = planner().estimate, planner().warmup()
    parts = estimate.cost(phase, 1)
    head = 2 * estimate.heads + optimizer_bytes("adamw_torch", estimate.head_shapes)
    assert sum(estimate.state()) == parts.adapters + parts.heads + parts.gradients + parts.optimizer - head


def test_the_benchmark_and_its_results(tmp_path: Path) -> None:
    """The script runs, and what it found on the large shapes covers the whole product within three percent."""
    from plan_accuracy import DEFAULT, main

    out = tmp_path / "result.json"
    result = main(["--shape", "tiny", "--out", str(out)])
    assert json.loads(out.read_text())["largest_error"] == result["largest_error"] == 0.0
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "plan-accuracy-cpu.json"
    rows = json.loads(results.read_text())["rows"]
    seen = {(r["shape"], r["live"], r["dtype"], r["dropout"], r["checkpointing"]) for r in rows}
    assert len(seen) == len(rows) == len(DEFAULT) * 4 * 2 * 2 * 2
    assert all(abs(r["predicted_bytes"] / r["counted_bytes"] - 1) < 0.03 for r in rows)

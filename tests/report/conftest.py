"""Records of runs on the shapes of real models, made up but consistent."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from weightlora.runs.record import AdapterScore, Kept, PhaseResult, Record

BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA = (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")
ENCODER = (*(f"self_attn.{x}" for x in ATTENTION), "fc1", "fc2")
DECODER = (*(f"self_attn.{x}" for x in ATTENTION), *(f"encoder_attn.{x}" for x in ATTENTION), "fc1", "fc2")

Spot = tuple[str, int | None, str]  # name, block, kind


def stack(prefix: str, blocks: int, kinds: Sequence[str]) -> list[Spot]:
    return [(f"{prefix}.{block}.{kind}", block, kind) for block in range(blocks) for kind in kinds]


SHAPES: dict[str, list[Spot]] = {
    "bert": stack("base_model.model.bert.encoder.layer", 6, BERT),
    "deberta": stack(
        "base_model.model.deberta.encoder.layer",
        12,
        tuple(f"attention.self.{x}_proj" for x in ("query", "key", "value")),
    ),
    "llama": stack("base_model.model.model.layers", 32, LLAMA),
    "bart": stack("base_model.model.model.encoder.layers", 6, ENCODER)
    + stack("base_model.model.model.decoder.layers", 6, DECODER),
    "one": [("base_model.model.model.layers.0.self_attn.q_proj", 0, "self_attn.q_proj")],
    "holes": [
        spot
        for spot in [*stack("m.layer", 5, ("query", "value")), ("m.pooler.dense", None, "pooler.dense")]
        if spot[1] not in {1, 3}
    ],
}


def scores(spots: Sequence[Spot], kept: Sequence[int], omega: Callable[[int], float]) -> tuple[AdapterScore, ...]:
    return tuple(
        AdapterScore(name=name, block=block, kind=kind, omega=omega(i), score=None, kept=i in kept)
        for i, (name, block, kind) in enumerate(spots)
    )


def phase(name: str, **changes: Any) -> PhaseResult:
    fields: dict[str, Any] = {
        "name": name,
        "steps": 100,
        "seconds": 20.0,
        "micro_batch": 8,
        "accumulation": 1,
        "kept_activation_bytes": 455 * 2**20,
        "peak_memory_bytes": None,
        "flops_per_step": 280_300_000_000,
        "trainable_params": 61_440,
    }
    return PhaseResult(**(fields | changes))


def make_record(shape: str = "bert", k: int | None = None, **changes: Any) -> Record:
    """A finished run on ``shape`` that kept ``k`` adapters (by default a quarter), chosen and gated by chance."""
    spots, rng = SHAPES[shape], random.Random(0)
    k = max(1, len(spots) // 4) if k is None else k
    chosen = sorted(rng.sample(range(len(spots)), k))
    adapters = scores(spots, chosen, lambda _: round(rng.gauss(0.9, 0.4), 3))
    fields: dict[str, Any] = {
        "status": "ok",
        "method": "weightlora",
        "preset": "recommended",
        "task": "sst2",
        "model": shape,
        "seed": 0,
        "k": k,
        "r": 8,
        "n_adapters": len(adapters),
        "kept": tuple(Kept(name=a.name, omega=a.omega, rank=8) for a in adapters if a.kept),
        "adapters": adapters,
        "trainable_params": {"warmup": 442_368, "final": 61_440},
        "metrics": {"accuracy": 0.8922},
        "metric": "accuracy",
        "phases": (
            phase(
                "warmup",
                seconds=40.0,
                accumulation=2,
                kept_activation_bytes=1545 * 2**20,
                flops_per_step=434_700_000_000,
                trainable_params=442_368,
            ),
            phase("final", steps=300, seconds=60.0),
        ),
        "seam_step": 100,
        "max_steps": 400,
        "why": "the largest omega at step 100",
        "versions": {"python": "3.11.0"},
        "argv": ("weightlora", "train"),
        "config": {},
        "error": None,
        "machine": {"architecture": "x86_64", "cores": 2},
    }
    return Record(**(fields | changes))


@pytest.fixture
def make() -> Callable[..., Record]:
    return make_record

"""The formulas of WeightLoRA on tensors and numbers: projection, gate step, growth, budget, importance."""

from __future__ import annotations

from weightlora.core.blocks import block_gates
from weightlora.core.budget import (
    Remainder,
    adapter_params,
    grown_ranks,
    k_for_params,
    parse_params,
    rank_for_params,
    resolve_k,
    total_params,
)
from weightlora.core.factorise import major_pair, minor_pair
from weightlora.core.gates import Shape, gate_step, gradual_k
from weightlora.core.growth import Grown, Growth, Noise, grow
from weightlora.core.importance import coverage, credit, gate_gradient, one_shot
from weightlora.core.merging import svd_merge
from weightlora.core.prefix import smallest_prefix
from weightlora.core.projection import Rule, support, top_k
from weightlora.core.rounds import hand_out

__all__ = [
    "Grown",
    "Growth",
    "Noise",
    "Remainder",
    "Rule",
    "Shape",
    "adapter_params",
    "block_gates",
    "coverage",
    "credit",
    "gate_gradient",
    "gate_step",
    "gradual_k",
    "grow",
    "grown_ranks",
    "hand_out",
    "k_for_params",
    "major_pair",
    "minor_pair",
    "one_shot",
    "parse_params",
    "rank_for_params",
    "resolve_k",
    "smallest_prefix",
    "support",
    "svd_merge",
    "top_k",
    "total_params",
]

"""The formulas of WeightLoRA on tensors and numbers: projection, gate step, growth, budget, importance."""

from __future__ import annotations

from weightlora.core.budget import (
    Remainder,
    adapter_params,
    grown_ranks,
    k_for_params,
    mean_rank_for_params,
    parse_params,
    rank_for_params,
    resolve_k,
    total_params,
)
from weightlora.core.components import component_shares, rising_cuts, unevenness
from weightlora.core.gates import Shape, gate_step, gradual_k
from weightlora.core.growth import Grown, Growth, Noise, grow
from weightlora.core.importance import coverage, credit, gate_gradient, one_shot
from weightlora.core.projection import Rule, support, top_k
from weightlora.core.triplets import (
    above_smallest,
    cubic_budget,
    orthogonality,
    smooth_sensitivity,
    triplet_scores,
)

__all__ = [
    "Grown",
    "Growth",
    "Noise",
    "Remainder",
    "Rule",
    "Shape",
    "above_smallest",
    "adapter_params",
    "component_shares",
    "coverage",
    "credit",
    "cubic_budget",
    "gate_gradient",
    "gate_step",
    "gradual_k",
    "grow",
    "grown_ranks",
    "k_for_params",
    "mean_rank_for_params",
    "one_shot",
    "orthogonality",
    "parse_params",
    "rank_for_params",
    "resolve_k",
    "rising_cuts",
    "smooth_sensitivity",
    "support",
    "top_k",
    "total_params",
    "triplet_scores",
    "unevenness",
]

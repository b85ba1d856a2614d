"""The formulas of WeightLoRA on tensors and numbers: projection, gate step, growth, budget, importance."""

from __future__ import annotations

from weightlora.core.blocks import block_gates
from weightlora.core.budget import (
    Remainder,
    adapter_params,
    affordable,
    grown_ranks,
    k_for_params,
    parse_params,
    rank_for_params,
    resolve_k,
    total_params,
)
from weightlora.core.components import component_shares, rising_cuts, unevenness
from weightlora.core.factorise import major_pair, minor_pair
from weightlora.core.gates import Shape, gate_step, gradual_k
from weightlora.core.growth import Grown, Growth, Noise, grow
from weightlora.core.importance import (
    coverage,
    credit,
    cross_energy,
    gate_gradient,
    gate_points,
    holding,
    integrated,
    one_shot,
    trapezoid,
    whitened_energy,
)
from weightlora.core.merging import svd_merge
from weightlora.core.placement import Placement, PlacementCosts, place
from weightlora.core.prefix import smallest_prefix
from weightlora.core.projection import Rule, support, top_k
from weightlora.core.published import (
    alignment,
    condition_number,
    explained_variance,
    linear_cka,
    proportional_ranks,
    scaled_ranks,
    sensitivity,
)
from weightlora.core.rounds import hand_out, one_round
from weightlora.core.sizes import format_bytes, parse_bytes, parse_share
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
    "Placement",
    "PlacementCosts",
    "Remainder",
    "Rule",
    "Shape",
    "above_smallest",
    "adapter_params",
    "affordable",
    "alignment",
    "block_gates",
    "component_shares",
    "condition_number",
    "coverage",
    "credit",
    "cross_energy",
    "cubic_budget",
    "explained_variance",
    "format_bytes",
    "gate_gradient",
    "gate_points",
    "gate_step",
    "gradual_k",
    "grow",
    "grown_ranks",
    "hand_out",
    "holding",
    "integrated",
    "k_for_params",
    "linear_cka",
    "major_pair",
    "minor_pair",
    "one_round",
    "one_shot",
    "orthogonality",
    "parse_bytes",
    "parse_params",
    "parse_share",
    "place",
    "proportional_ranks",
    "rank_for_params",
    "resolve_k",
    "rising_cuts",
    "scaled_ranks",
    "sensitivity",
    "smallest_prefix",
    "smooth_sensitivity",
    "support",
    "svd_merge",
    "top_k",
    "total_params",
    "trapezoid",
    "triplet_scores",
    "unevenness",
    "whitened_energy",
]

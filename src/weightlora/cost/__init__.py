"""What anything costs: what backward will find in memory, the bytes of each phase, placements, and counts of a step."""

from weightlora.core import PlacementCosts
from weightlora.cost.activations import ActivationTrace, Storage
from weightlora.cost.estimate import Estimate, Phase, Setting, Traced
from weightlora.cost.levels import operation_costs, placement_costs, reserved
from weightlora.cost.measure import Kept, PeakMemory, StepCost, counting, isolated_rng, kept_bytes, step_cost
from weightlora.cost.tensors import Parts
from weightlora.cost.tracing import trace

__all__ = [
    "ActivationTrace",
    "Estimate",
    "Kept",
    "Parts",
    "PeakMemory",
    "Phase",
    "PlacementCosts",
    "Setting",
    "StepCost",
    "Storage",
    "Traced",
    "counting",
    "isolated_rng",
    "kept_bytes",
    "operation_costs",
    "placement_costs",
    "reserved",
    "step_cost",
    "trace",
]

"""What anything costs: what backward will find in memory, the bytes of each phase, placements, and counts of a step."""

from weightlora.core import PlacementCosts
from weightlora.cost.activations import ActivationTrace, Storage
from weightlora.cost.estimate import Estimate, Phase, PhaseCost, Setting, Traced, divisors
from weightlora.cost.measure import KeptTensors, PeakMemory, StepCost, counting, isolated_rng, kept_bytes, step_cost
from weightlora.cost.operations import operations
from weightlora.cost.placements import placement_costs
from weightlora.cost.plan import Plan, Planner
from weightlora.cost.plan_config import PlanConfig
from weightlora.cost.tracing import trace

__all__ = [
    "ActivationTrace",
    "Estimate",
    "KeptTensors",
    "PeakMemory",
    "Phase",
    "PhaseCost",
    "PlacementCosts",
    "Plan",
    "PlanConfig",
    "Planner",
    "Setting",
    "StepCost",
    "Storage",
    "Traced",
    "counting",
    "divisors",
    "isolated_rng",
    "kept_bytes",
    "operations",
    "placement_costs",
    "step_cost",
    "trace",
]

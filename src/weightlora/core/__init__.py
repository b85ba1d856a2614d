"""The formulas of WeightLoRA on tensors and numbers: projection, gate step, growth, budget, importance."""

from weightlora.core.importance import coverage
from weightlora.core.placement import PlacementCosts, place
from weightlora.core.published import proportional_ranks

__all__ = ["PlacementCosts", "coverage", "place", "proportional_ranks"]

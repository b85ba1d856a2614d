"""The formulas of WeightLoRA on tensors and numbers: projection, gate step, growth, budget, importance."""

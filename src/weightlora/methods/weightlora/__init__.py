"""WeightLoRA: a weight per adapter, the K best kept. WeightLoRA+: those grow into what the others have set free."""

from weightlora.methods.weightlora.plus import WeightLoRAPlus
from weightlora.methods.weightlora.settings import WeightLoRA

__all__ = ["WeightLoRA", "WeightLoRAPlus"]

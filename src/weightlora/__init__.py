"""Find out where LoRA adapters should go, remove the rest, and prove what that saved.

import weightlora as wl
result = wl.fit(trainer, wl.WeightLoRA(k=10, warmup_steps=100))   # instead of trainer.train()
wl.export(result, "out/", profile="portable")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlora.errors import WeightLoRAError
    from weightlora.graft import Selection
    from weightlora.graft.export import export
    from weightlora.methods import (
        AdaLoRA,
        ALoRA,
        DoRA,
        DynamicLoRA,
        FlexLoRA,
        Flexora,
        Full,
        Gradient,
        HeadOnly,
        IncreLoRA,
        LoRA,
        LoRADrop,
        MELoRA,
        MiLoRA,
        NoRA,
        Random,
        TiedLoRA,
        Top,
        VBLoRA,
        VeRA,
        WeightLoRA,
        WeightLoRAPlus,
        method,
    )
    from weightlora.training import FitResult, Tuner, attach, fit

__version__ = "0.1.0"

# Loaded on first use: `import weightlora` costs nothing, and reports are drawn without torch.
_HOME = {
    "ALoRA": "weightlora.methods",
    "AdaLoRA": "weightlora.methods",
    "DoRA": "weightlora.methods",
    "DynamicLoRA": "weightlora.methods",
    "FitResult": "weightlora.training",
    "FlexLoRA": "weightlora.methods",
    "Flexora": "weightlora.methods",
    "Full": "weightlora.methods",
    "HeadOnly": "weightlora.methods",
    "Gradient": "weightlora.methods",
    "IncreLoRA": "weightlora.methods",
    "LoRA": "weightlora.methods",
    "LoRADrop": "weightlora.methods",
    "MELoRA": "weightlora.methods",
    "MiLoRA": "weightlora.methods",
    "NoRA": "weightlora.methods",
    "Random": "weightlora.methods",
    "Selection": "weightlora.graft",
    "TiedLoRA": "weightlora.methods",
    "Top": "weightlora.methods",
    "Tuner": "weightlora.training",
    "VBLoRA": "weightlora.methods",
    "VeRA": "weightlora.methods",
    "WeightLoRA": "weightlora.methods",
    "WeightLoRAError": "weightlora.errors",
    "WeightLoRAPlus": "weightlora.methods",
    "attach": "weightlora.training",
    "export": "weightlora.graft.export",
    "fit": "weightlora.training",
    "method": "weightlora.methods",
}

__all__ = [
    "ALoRA",
    "AdaLoRA",
    "DoRA",
    "DynamicLoRA",
    "FitResult",
    "FlexLoRA",
    "Flexora",
    "Full",
    "Gradient",
    "HeadOnly",
    "IncreLoRA",
    "LoRA",
    "LoRADrop",
    "MELoRA",
    "MiLoRA",
    "NoRA",
    "Random",
    "Selection",
    "TiedLoRA",
    "Top",
    "Tuner",
    "VBLoRA",
    "VeRA",
    "WeightLoRA",
    "WeightLoRAError",
    "WeightLoRAPlus",
    "attach",
    "export",
    "fit",
    "method",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'weightlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

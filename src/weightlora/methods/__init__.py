"""Who decides what lives, and why. Methods read gradients and gates; they touch no optimizer and write no file."""

from __future__ import annotations

import difflib

from weightlora.errors import ConfigError
from weightlora.methods.adalora import AdaLoRA
from weightlora.methods.alora import ALoRA
from weightlora.methods.base import AdapterMethod, Limit, Method, Needs, PeftMethod, PlainMethod, TunerMethod
from weightlora.methods.baselines import (
    DeepestAdapters,
    LoRA,
    OneShotGradient,
    RandomAdapters,
)
from weightlora.methods.dynamic_lora import DynamicLoRA
from weightlora.methods.flexlora import FlexLoRA
from weightlora.methods.flexora import Flexora
from weightlora.methods.increlora import IncreLoRA
from weightlora.methods.lora_drop import LoRADrop
from weightlora.methods.melora import MELoRA
from weightlora.methods.milora import MiLoRA
from weightlora.methods.nora import NoRA
from weightlora.methods.placements import (
    CKA,
    EVA,
    Aletheia,
    AttentionOutput,
    DomLoRA,
    FeedForward,
    GoRA,
    KappaTune,
    PLoP,
)
from weightlora.methods.plain import FullFineTuning, HeadOnly, ZeroShot
from weightlora.methods.policy import (
    Budget,
    Decision,
    Fixed,
    Fresh,
    GrowthPlan,
    HeldOut,
    Policy,
    Restarting,
    Room,
    Setup,
    StepView,
)
from weightlora.methods.tied_lora import TiedLoRA
from weightlora.methods.tuners import DoRA, VBLoRA, VeRA
from weightlora.methods.weightlora import WeightLoRA, WeightLoRAPlus

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        WeightLoRA,
        WeightLoRAPlus,
        LoRA,
        FullFineTuning,
        HeadOnly,
        ZeroShot,
        RandomAdapters,
        DeepestAdapters,
        OneShotGradient,
        AdaLoRA,
        IncreLoRA,
        DynamicLoRA,
        LoRADrop,
        ALoRA,
        Flexora,
        FlexLoRA,
        MELoRA,
        TiedLoRA,
        NoRA,
        MiLoRA,
        DomLoRA,
        EVA,
        PLoP,
        CKA,
        Aletheia,
        KappaTune,
        GoRA,
        AttentionOutput,
        FeedForward,
        DoRA,
        VeRA,
        VBLoRA,
    )
}


def method(name: str, preset: str = "recommended", **settings: object) -> Method:
    """The method called `name` with a preset's values and your own settings on top.

    Raises:
        ConfigError: unknown name (with the nearest one), preset or setting.

    >>> method("random", k=5, seed=1).k
    5
    """
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if str(name).endswith((".yaml", ".yml")):
            hint = f"a recipe is the first word: weightlora train {name}; "
        raise ConfigError(f"method {name!r} is unknown; {hint}the methods are {', '.join(METHODS)}")
    return METHODS[name].from_preset(preset, **settings)


__all__ = [
    "CKA", "EVA", "METHODS", "ALoRA", "AdaLoRA", "AdapterMethod", "Aletheia", "AttentionOutput", "Budget", "Decision",
    "DeepestAdapters", "DoRA", "DomLoRA", "DynamicLoRA", "FeedForward", "Fixed", "FlexLoRA", "Flexora", "Fresh",
    "FullFineTuning", "GoRA", "GrowthPlan", "HeadOnly", "HeldOut", "IncreLoRA", "KappaTune", "Limit", "LoRA",
    "LoRADrop", "MELoRA", "Method", "MiLoRA", "Needs", "NoRA", "OneShotGradient", "PLoP", "PeftMethod", "PlainMethod",
    "Policy", "RandomAdapters", "Restarting", "Room", "Setup", "StepView", "TiedLoRA", "TunerMethod", "VBLoRA",
    "VeRA", "WeightLoRA", "WeightLoRAPlus", "ZeroShot", "method",
]  # fmt: skip

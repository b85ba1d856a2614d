"""Find out where LoRA adapters should go, remove the rest, and prove what that saved.

import weightlora as wl
result = wl.fit(trainer, wl.WeightLoRA(k=10, select_after=100))   # instead of trainer.train()
wl.export(result, "out/", profile="portable")
"""

import lazy_loader

__version__ = "0.2.0"

# Loaded on first use: `import weightlora` costs nothing, and reports are drawn without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

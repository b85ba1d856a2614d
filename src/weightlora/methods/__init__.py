"""Who decides what lives, and why. Methods read gradients and gates; they touch no optimizer and write no file."""

import lazy_loader

# Loaded on first use: which methods there are is looked up, for help, without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""What anything costs: what backward will find in memory, the bytes of each phase, placements, and counts of a step."""

import lazy_loader

# Loaded on first use: what a plan may be told is looked up, for help, without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

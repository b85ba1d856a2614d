"""Placements that were published, or made by hand: one look at the model before the first step, then LoRA on a part."""

from weightlora.methods.placements.blocks import CKA, Aletheia
from weightlora.methods.placements.by_hand import AttentionOutput, FeedForward
from weightlora.methods.placements.domlora import DomLoRA
from weightlora.methods.placements.eva import EVA
from weightlora.methods.placements.gora import GoRA
from weightlora.methods.placements.kappatune import KappaTune
from weightlora.methods.placements.plop import PLoP

__all__ = ["CKA", "EVA", "Aletheia", "AttentionOutput", "DomLoRA", "FeedForward", "GoRA", "KappaTune", "PLoP"]

"""Steps and the seam: ``fit`` around a trainer, ``attach`` for a loop of your own."""

from weightlora.training.fit import FitResult, PhaseResult, fit
from weightlora.training.held_out import rows_to_hold_out
from weightlora.training.loop import Tuner, attach

__all__ = ["FitResult", "PhaseResult", "Tuner", "attach", "fit", "rows_to_hold_out"]

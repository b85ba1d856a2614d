"""Targets of a regression: trained in units of their own spread, answered in the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from weightlora.errors import DataError

if TYPE_CHECKING:
    from weightlora.tasks.metrics import Array, Metric

CONFIG_KEY = "regression_targets"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Standardise targets, ``z = (y - mean) / std``, and turn a head that answers z into one that answers y.

    A new head answers 0, and a rate that suits adapters moves its bias far too slowly to reach the targets' mean; until
    then that offset is most of the gradient.

    Args:
        head: name of the linear layer, with one output, that answers.
        mean: of the training targets; 0 where the head has no bias that could hold it.
        std: their standard deviation; without a bias their root mean square.
    """

    head: str
    mean: float
    std: float

    @classmethod
    def of(cls, targets: Sequence[float], head: str, *, bias: bool) -> Targets:
        """Measure training targets.

        Args:
            targets: (rows,), in the user's units.
            head: name of the linear layer, with one output, that answers.
            bias: whether that layer has one.

        Raises:
            DataError: all targets are equal, so there is nothing to learn.

        >>> Targets.of([1.0, 3.0], "classifier", bias=True)
        Targets(head='classifier', mean=2.0, std=1.0)
        """
        values = np.asarray(targets, dtype=np.float64)
        if np.ptp(values) == 0:
            raise DataError(f"all training targets are {values[0]:g}; a regression needs at least two different ones")
        if not bias:
            return cls(head=head, mean=0.0, std=math.sqrt(float(np.mean(values**2))))
        return cls(head=head, mean=float(values.mean()), std=float(values.std()))

    def standard(self, targets: Sequence[float]) -> list[float]:
        """Targets in units of their spread."""
        return ((np.asarray(targets, dtype=np.float64) - self.mean) / self.std).tolist()

    def own(self, values: object) -> Array:
        """Standardised values in the user's units."""
        return np.asarray(values, dtype=np.float64) * self.std + self.mean

    def judge(self, compute: Metric) -> Metric:
        """A metric of standardised predictions and labels, computed in the user's units."""

        def judged(prediction: EvalPrediction) -> dict[str, float]:
            given = prediction.predictions
            first = given[0] if isinstance(given, tuple) else given
            return compute(EvalPrediction(predictions=self.own(first), label_ids=self.own(prediction.label_ids)))

        return judged

    def announce(self, config: object, *, folded: bool = False) -> None:
        """Write mean and standard deviation into a model's config, and whether its head answers in the user's units."""
        setattr(config, CONFIG_KEY, {"mean": self.mean, "std": self.std, "folded": folded})

    def fold(self, head: nn.Linear, config: object) -> None:
        """Make the trained head answer in the user's units: ``W <- std W``, ``b <- std b + mean``.

        Args:
            head: the layer named `head`, as it was trained; changed in place.
            config: of its model; it says that the head was folded.
        """
        with torch.no_grad():
            head.weight.mul_(self.std)
            if head.bias is not None:
                head.bias.mul_(self.std).add_(self.mean)
        self.announce(config, folded=True)

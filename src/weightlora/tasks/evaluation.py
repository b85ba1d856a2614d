"""How answers are scored token by token, and trainers whose evaluation loss is the mean over all answer tokens."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

IGNORED = -100
Logits: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]

Predictions: TypeAlias = torch.Tensor | tuple[torch.Tensor | None, ...] | None
Step: TypeAlias = tuple[torch.Tensor | float | None, Predictions, torch.Tensor | None]


def token_scores(logits: Logits, labels: torch.Tensor, *, ahead: int = 1) -> torch.Tensor:
    """Sum of negative log-likelihoods, right guesses, and tokens, of each row's answer.

    Args:
        logits: (rows, tokens, vocabulary), or a tuple that begins with it; position t speaks of token ``t + ahead``.
        labels: (rows, tokens), -100 for what is not judged.
        ahead: 1 for a decoder alone, 0 behind an encoder, whose decoder is fed shifted labels.

    Returns:
        (rows, 3), float64.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    truth = labels[:, ahead:]
    judged = truth != IGNORED
    found, right = scores[:, : truth.shape[1]][judged].float(), truth[judged]
    losses = torch.nn.functional.cross_entropy(found, right, reduction="none")
    each = torch.stack([losses, found.argmax(-1) == right, torch.ones_like(losses)], dim=1).double()
    return each.new_zeros(len(labels), 3).index_add_(0, judged.nonzero()[:, 0], each)


def mean_loss(scores: object) -> float:
    """The mean loss of a token, over all rows, from `token_scores`."""
    loss, _, count = np.asarray(scores, dtype=np.float64).sum(0)
    return float(loss / count)


def without_loss(
    trainer: Trainer, model: nn.Module, inputs: dict[str, torch.Tensor], ignore_keys: list[str] | None
) -> tuple[Logits, torch.Tensor]:
    """A batch's logits and labels; given the labels, the model would take a loss over all positions, for nothing."""
    inputs = dict(trainer._prepare_inputs(inputs))
    labels = inputs.pop("labels")
    _, logits, _ = Trainer.prediction_step(trainer, model, inputs, False, ignore_keys)
    return logits, labels  # type: ignore[return-value]


class OwnLossTrainer(Trainer):
    """A ``Trainer`` that leaves ``eval_loss`` to ``compute_metrics``, whose key ``loss`` it becomes.

    Its own would be a mean of the batches' means, in which a token counts more in a batch with few of them.
    """

    def prediction_step(  # type: ignore[override]  # predictions may be several tensors
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Step:
        if prediction_loss_only:
            return super().prediction_step(model, inputs, True, ignore_keys)
        return None, *without_loss(self, model, inputs, ignore_keys)


class SummaryTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer`` whose predictions are generated tokens and the reference's `token_scores`; its ``eval_loss``
    is left to ``compute_metrics``, as :class:`OwnLossTrainer` does."""

    def prediction_step(  # type: ignore[override]  # predictions may be several tensors
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: object,
    ) -> Step:
        loss, tokens, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        if prediction_loss_only or not self.args.predict_with_generate:  # type: ignore[attr-defined]
            return loss, tokens, labels
        inputs = self._prepare_inputs(inputs)
        _, logits, _ = Trainer.prediction_step(self, model, inputs, False, ignore_keys)
        return None, (tokens, token_scores(logits, inputs["labels"], ahead=0)), labels  # type: ignore[arg-type]

"""The numbers a task is judged by: each takes a trainer's predictions and returns a dictionary of plain floats."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

Metric = Callable[[EvalPrediction], dict[str, float]]
Array = npt.NDArray[np.float64]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is the label's: SST-2, RTE, QNLI.

    Args:
        prediction: ``predictions`` are logits (rows, classes), ``label_ids`` class indices (rows,).

    Returns:
        ``{"accuracy": ...}``.

    >>> accuracy(EvalPrediction(predictions=np.array([[0.1, 0.9], [0.8, 0.2]]), label_ids=np.array([1, 1])))
    {'accuracy': 0.5}
    """
    guesses, labels = _classes(prediction)
    return {"accuracy": float(accuracy_score(labels, guesses))}


def accuracy_matched(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy under the name ``accuracy_matched``: MNLI on the matched validation set."""
    return {"accuracy_matched": accuracy(prediction)["accuracy"]}


def matthews_correlation(prediction: EvalPrediction) -> dict[str, float]:
    """Matthews correlation of guesses and labels, 0 if either is constant: CoLA."""
    guesses, labels = _classes(prediction)
    return {"matthews_correlation": float(matthews_corrcoef(labels, guesses))}


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 of class 1, and their mean ``acc_f1``: MRPC and QQP.

    The mean is taken before tasks are averaged, as the GLUE leaderboard does.
    """
    guesses, labels = _classes(prediction)
    share = float(accuracy_score(labels, guesses))
    f1 = float(f1_score(labels, guesses, zero_division=0.0))
    return {"accuracy": share, "f1": f1, "acc_f1": (share + f1) / 2}


def accuracy_and_macro_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and the unweighted mean of the F1 of every class that occurs: a user's own classes."""
    guesses, labels = _classes(prediction)
    macro = float(f1_score(labels, guesses, average="macro", zero_division=0.0))
    return {"accuracy": float(accuracy_score(labels, guesses)), "macro_f1": macro}


def correlation(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson and Spearman correlation, and their mean ``corr``: STS-B.

    Args:
        prediction: ``predictions`` are scores (rows, 1) or (rows,), ``label_ids`` targets (rows,).

    Returns:
        ``pearson``, ``spearman`` and ``corr``; each 0 where predictions or targets are constant.

    >>> correlation(EvalPrediction(predictions=np.array([[3.0], [3.0]]), label_ids=np.array([1.0, 5.0])))
    {'pearson': 0.0, 'spearman': 0.0, 'corr': 0.0}
    """
    scores, targets = _scores(prediction)
    pearson = _correlate(stats.pearsonr, scores, targets)
    spearman = _correlate(stats.spearmanr, scores, targets)
    return {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}


def regression(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson, Spearman and the mean squared error: a user's own numeric target."""
    scores, targets = _scores(prediction)
    both = correlation(prediction)
    mse = float(np.mean((scores - targets) ** 2))
    return {"pearson": both["pearson"], "spearman": both["spearman"], "mse": mse}


def _logits(prediction: EvalPrediction) -> npt.NDArray[np.generic]:
    # Encoder-decoder models hand over (logits, encoder states, ...).
    first = prediction.predictions
    return np.asarray(first[0] if isinstance(first, tuple) else first)


def _classes(prediction: EvalPrediction) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return _logits(prediction).argmax(axis=-1), np.asarray(prediction.label_ids)


def _scores(prediction: EvalPrediction) -> tuple[Array, Array]:
    scores = _logits(prediction).astype(np.float64).reshape(-1)
    return scores, np.asarray(prediction.label_ids).astype(np.float64).reshape(-1)


def _correlate(measure: Callable[[Array, Array], tuple[float, float]], scores: Array, targets: Array) -> float:
    """A correlation that is 0 where it is undefined: a constant side, one row, or a value that is not finite."""
    if len(scores) < 2 or not np.isfinite(scores).all() or np.ptp(scores) == 0 or np.ptp(targets) == 0:
        return 0.0
    with warnings.catch_warnings():
        # Nearly constant scores are legitimate in the first steps of training.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(measure(scores, targets)[0])

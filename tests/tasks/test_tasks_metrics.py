"""Every metric against a second computation from its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from transformers import EvalPrediction

from weightlora.tasks import metrics
from weightlora.tasks.glue import GLUE


def classes(count: int, rows: int = 200, seed: int = 0) -> tuple[EvalPrediction, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, count, rows)
    logits = generator.normal(size=(rows, count)).astype(np.float32)
    logits[np.arange(rows), labels] += 0.8
    return EvalPrediction(predictions=logits, label_ids=labels), logits.argmax(1), labels


def f1(guesses: np.ndarray, labels: np.ndarray, label: int) -> float:
    hits = ((guesses == label) & (labels == label)).sum()
    wrong = ((guesses == label) != (labels == label)).sum()
    return float(2 * hits / (2 * hits + wrong)) if hits + wrong else 0.0


def test_accuracies() -> None:
    prediction, guesses, labels = classes(3)
    share = sum(int(a == b) for a, b in zip(guesses, labels, strict=True)) / len(labels)
    assert metrics.accuracy(prediction) == {"accuracy": pytest.approx(share)}
    assert metrics.accuracy_matched(prediction) == {"accuracy_matched": pytest.approx(share)}


def test_matthews_correlation_is_the_correlation_of_indicators() -> None:
    prediction, guesses, labels = classes(2)
    expected = np.corrcoef(guesses, labels)[0, 1]
    assert metrics.matthews_correlation(prediction) == {"matthews_correlation": pytest.approx(expected)}


def test_accuracy_and_f1() -> None:
    prediction, guesses, labels = classes(2, seed=1)
    share, score = float((guesses == labels).mean()), f1(guesses, labels, 1)
    expected = {"accuracy": share, "f1": score, "acc_f1": (share + score) / 2}
    assert metrics.accuracy_and_f1(prediction) == pytest.approx(expected)


def test_macro_f1() -> None:
    prediction, guesses, labels = classes(5, seed=2)
    expected = {"accuracy": (guesses == labels).mean(), "macro_f1": np.mean([f1(guesses, labels, c) for c in range(5)])}
    assert metrics.accuracy_and_macro_f1(prediction) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(300, 1), (300,)])
def test_correlations_and_error(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    targets = np.round(generator.uniform(0, 5, 300) * 4) / 4  # with ties
    scores = (targets + generator.normal(size=300)).astype(np.float32)
    prediction = EvalPrediction(predictions=scores.reshape(shape), label_ids=targets.astype(np.float32))
    pearson = np.corrcoef(scores.astype(np.float64), targets)[0, 1]
    spearman = np.corrcoef(stats.rankdata(scores), stats.rankdata(targets))[0, 1]
    expected = {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}
    assert metrics.correlation(prediction) == pytest.approx(expected)
    mse = sum((float(a) - float(b)) ** 2 for a, b in zip(scores, targets, strict=True)) / 300
    expected = {"pearson": pearson, "spearman": spearman, "mse": mse}
    assert metrics.regression(prediction) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [np.full((50, 1), 2.5), np.full(50, np.nan), np.full(50, -np.inf)])
def test_constant_or_broken_scores_correlate_with_nothing(scores: np.ndarray) -> None:
    result = metrics.correlation(EvalPrediction(predictions=scores, label_ids=np.linspace(0, 5, 50)))
    assert result == {"pearson": 0.0, "spearman": 0.0, "corr": 0.0}


def test_nearly_constant_scores_and_constant_targets_do_not_warn() -> None:
    near = 1e9 + 1e-6 * np.arange(50)
    result = metrics.correlation(EvalPrediction(predictions=near, label_ids=np.linspace(0, 5, 50)))
    assert all(np.isfinite(value) for value in result.values())
    constant = EvalPrediction(predictions=np.linspace(0, 1, 50), label_ids=np.ones(50))
    assert metrics.correlation(constant)["corr"] == 0.0
    assert metrics.correlation(EvalPrediction(predictions=np.ones((1, 1)), label_ids=np.ones(1)))["corr"] == 0.0


def test_constant_guesses_do_not_warn() -> None:
    labels = np.array([0, 1, 1, 0])
    prediction = EvalPrediction(predictions=np.array([[1.0, 0.0]] * 4), label_ids=labels)
    assert metrics.matthews_correlation(prediction) == {"matthews_correlation": 0.0}
    assert metrics.accuracy_and_f1(prediction) == {"accuracy": 0.5, "f1": 0.0, "acc_f1": 0.25}
    assert metrics.accuracy_and_macro_f1(prediction)["macro_f1"] == pytest.approx(1 / 3)


def test_encoder_decoder_outputs_and_plain_floats() -> None:
    prediction, _, labels = classes(2)
    nested = EvalPrediction(predictions=(prediction.predictions, np.zeros((200, 7, 4))), label_ids=labels)
    for name in GLUE.keys() - {"stsb"}:
        result = GLUE[name].compute(prediction)
        assert GLUE[name].metric in result
        assert all(type(value) is float for value in result.values())
        assert GLUE[name].compute(nested) == result
    scores = EvalPrediction(predictions=np.array([1.0, 2.0, 4.0]), label_ids=np.array([1.0, 2.0, 3.0]))
    assert GLUE["stsb"].metric in metrics.correlation(scores)

"""The numbers a text is judged by: spans against reference answers (SQuAD), summaries against summaries (ROUGE)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

Predictions = Mapping[str, str]
References = Mapping[str, Sequence[str]]
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra space: what SQuAD compares.

    >>> normalize_answer("The  U.S. dollar")
    'us dollar'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def squad(predictions: Predictions, references: References) -> dict[str, float]:
    """Exact match and F1 of SQuAD 1.1, in percent: per question the best over its reference answers.

    F1 is ``2 p r / (p + r)`` over the words that prediction and answer share, counted with repetition.

    Args:
        predictions: question id -> predicted text.
        references: question id -> the annotators' answers, at least one; its questions are the ones that count.

    Returns:
        ``exact_match`` and ``f1``, as the official ``evaluate-v1.1.py`` gives.

    Raises:
        KeyError: a question without a prediction.

    >>> squad({"q": "the red cat"}, {"q": ["red cat", "a red hat"]})
    {'exact_match': 100.0, 'f1': 100.0}
    """
    exact, f1 = _answer_scores(predictions, references, empty_f1=0.0)
    return {"exact_match": _percent(exact, exact), "f1": _percent(f1, f1)}


def squad_v2(predictions: Predictions, references: References) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2.0, in percent, over all questions and over each kind.

    Args:
        predictions: question id -> predicted text, "" for none.
        references: question id -> the annotators' answers; none where the question has none.

    Returns:
        ``exact``, ``f1``, and the same with ``HasAns_`` and ``NoAns_`` in front, as the official ``evaluate-v2.0.py``
        names them (at its threshold 1: the choice to give no answer has been made).

    Raises:
        KeyError: a question without a prediction.

    >>> squad_v2({"q": "", "p": "cat"}, {"q": [], "p": ["a cat", "hat"]})["exact"]
    100.0
    """
    meaningful = {key: [a for a in answers if normalize_answer(a)] or [""] for key, answers in references.items()}
    exact, f1 = _answer_scores(predictions, meaningful, empty_f1=1.0)
    found = {"exact": _percent(exact, exact), "f1": _percent(f1, f1)}
    for prefix, answerable in (("HasAns", True), ("NoAns", False)):
        if keys := [key for key, answers in references.items() if bool(answers) is answerable]:
            found |= {f"{prefix}_exact": _percent(exact, keys), f"{prefix}_f1": _percent(f1, keys)}
    return found


def _answer_scores(
    predictions: Predictions, references: References, *, empty_f1: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match and F1 by question; ``empty_f1`` where prediction and answer both come down to no word at all."""
    exact, f1 = {}, {}
    for key, answers in references.items():
        guess = normalize_answer(predictions[key])
        truths = [normalize_answer(answer) for answer in answers]
        exact[key] = float(guess in truths)
        f1[key] = max(_word_f1(guess.split(), truth.split(), empty_f1) for truth in truths)
    return exact, f1


def _word_f1(guess: list[str], truth: list[str], empty: float) -> float:
    if not guess and not truth:
        return empty
    shared = sum((Counter(guess) & Counter(truth)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(guess), shared / len(truth)
    return 2 * precision * recall / (precision + recall)


def _percent(scores: Mapping[str, float], keys: Collection[str]) -> float:
    return 100.0 * sum(scores[key] for key in keys) / len(keys)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L with Porter stemming, from 0 to 1 (Lin 2004).

    Args:
        predictions: generated summaries.
        references: the written ones, in the same order.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, by Google's ``rouge-score``; a plain mean, no bootstrap.

    >>> rouge(["the cats sat"], ["the cat sat"])["rouge1"]
    1.0
    """
    from rouge_score import rouge_scorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(truth, guess) for guess, truth in zip(predictions, references, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}

"""From start and end logits to the most probable answer spans (Devlin et al. 2019, BERT, section 4.2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float64]


def best_spans(start: Logits, end: Logits, *, n_best: int, max_answer_length: int) -> list[tuple[float, int, int]]:
    """The ``n_best`` spans ``i <= j < i + max_answer_length`` with the largest ``start[i] + end[j]``, best first.

    Every span is looked at, while the usual scripts pair only the ``n_best`` best starts with the ``n_best`` best ends.

    Args:
        start: (tokens,), logits of starting there.
        end: (tokens,), logits of ending there, that token included.
        n_best: how many spans at most.
        max_answer_length: the most tokens in a span.

    Returns:
        ``(score, i, j)``; equal scores in the order of ``(i, j)``.

    >>> best_spans(np.array([0.0, 3.0, 1.0]), np.array([5.0, 1.0, 2.0]), n_best=2, max_answer_length=2)
    [(5.0, 0, 0), (5.0, 1, 2)]
    """
    tokens = len(start)
    lengths = np.arange(min(max_answer_length, tokens))
    ends = np.arange(tokens)[:, None] + lengths
    scores = np.where(ends < tokens, start[:, None] + end[np.minimum(ends, tokens - 1)], -np.inf).reshape(-1)
    count = min(n_best, int((ends < tokens).sum()))
    # Everything as good as the last of the best, so that ties are broken by position and not by chance.
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count] if count else np.inf
    best = np.flatnonzero(scores >= threshold)
    best = best[np.lexsort((best, -scores[best]))][:count]
    return [(float(scores[k]), int(k) // len(lengths), int(ends.reshape(-1)[k])) for k in best]

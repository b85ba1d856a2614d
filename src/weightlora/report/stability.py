"""Do seeds agree on what to keep? Overlaps of selections, beside those of random sets of the same size."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

from weightlora.report.tables import groups
from weightlora.runs.record import AdapterScore, Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    """How alike the selections of one method are over its seeds.

    For two runs that keep the sets A and B of n adapters, the overlap is ``|A & B| / min(|A|, |B|)``. Of two sets drawn
    at random it is on average ``max(|A|, |B|) / n``. Both are averaged over all pairs of different seeds.

    Args:
        label: of the method, as in the table of comparison.
        runs: how many finished runs were compared. ``pairs``: of them with different seeds.
        sizes: the fewest and the most adapters that a run kept. ``n``: adapters to choose from.
        shared, overlap: adapters that a pair has in common, and as a share, on average.
        random_shared, random_overlap: the same, expected of random sets.
        counts: adapter name to the number of runs that kept it.
        adapters: all n, of one of the runs.
    """

    label: str
    runs: int
    pairs: int
    sizes: tuple[int, int]
    n: int
    shared: float
    overlap: float
    random_shared: float
    random_overlap: float
    counts: dict[str, int]
    adapters: tuple[AdapterScore, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain numbers and names, without the list of all adapters."""
        data = dataclasses.asdict(self)
        del data["adapters"]
        return data


def stability(records: Sequence[Record]) -> list[Stability]:
    """One entry per method that chose a part of its adapters with two seeds or more.

    Runs over other adapters than most of their method's (another target, another model) have nothing to compare.
    """
    found = []
    for label, group in groups(records).items():
        chose = [run for run in group if run.status == "ok" and 0 < len(run.kept) < len(run.adapters)]
        if not chose:
            continue
        names = Counter(frozenset(entry.name for entry in run.adapters) for run in chose).most_common(1)[0][0]
        chose = [run for run in chose if {entry.name for entry in run.adapters} == names]
        sets = [(run.seed, frozenset(entry.name for entry in run.kept)) for run in chose]
        pairs = [(a, b) for (one, a), (other, b) in itertools.combinations(sets, 2) if one != other]
        if not pairs:
            continue
        n = len(names)
        found.append(
            Stability(
                label=label,
                runs=len(chose),
                pairs=len(pairs),
                sizes=(min(len(kept) for _, kept in sets), max(len(kept) for _, kept in sets)),
                n=n,
                shared=sum(len(a & b) for a, b in pairs) / len(pairs),
                overlap=sum(len(a & b) / min(len(a), len(b)) for a, b in pairs) / len(pairs),
                random_shared=sum(len(a) * len(b) / n for a, b in pairs) / len(pairs),
                random_overlap=sum(max(len(a), len(b)) / n for a, b in pairs) / len(pairs),
                counts=dict(Counter(entry.name for run in chose for entry in run.kept)),
                adapters=chose[0].adapters,
            )
        )
    return found

"""Numbers as people read them: one unit for a whole column, so that its cells compare at a glance."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

MISSING = "-"

Scale = tuple[tuple[float, float, str], ...]
"""Units from small to large: the value from which one is used, its factor, its sign."""

BYTES: Scale = ((0, 1, "B"), (2**10, 2**10, "KiB"), (2**20, 2**20, "MiB"), (10 * 2**30, 2**30, "GiB"))
FLOPS: Scale = ((0, 1e3, "kFLOP"), (1e6, 1e6, "MFLOP"), (1e9, 1e9, "GFLOP"), (10e12, 1e12, "TFLOP"))
COUNT: Scale = ((0, 1, ""), (1e3, 1e3, "k"), (1e6, 1e6, "M"), (1e9, 1e9, "G"))
SECONDS: Scale = ((0, 1e-3, "ms"), (1, 1, "s"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A factor and its sign; `cell` writes a number in it without the sign, `text` with it.

    >>> Unit.fit([1_620_000_000, 477_000_000], BYTES).text(477_000_000)
    '454.9 MiB'
    """

    factor: float
    sign: str
    digits: int

    @classmethod
    def fit(cls, values: Iterable[float | None], scale: Scale) -> Unit:
        """The largest unit of ``scale`` that the largest value reaches and in which the smallest is 0.1 or more.

        All cells show as many decimals as the smallest value needs for three digits, and at least one.
        """
        known = [value for value in values if value is not None and math.isfinite(value) and value > 0]
        _, factor, sign = scale[0]
        for start, larger, name in scale:
            if known and max(known) >= start and min(known) >= larger / 10:
                factor, sign = larger, name
        whole = all(value == int(value) for value in known) and factor == 1
        least = min(known, default=factor) / factor
        digits = 0 if whole else max(1, 2 - math.floor(math.log10(least)))
        return cls(factor=factor, sign=sign, digits=digits)

    def cell(self, value: float | None) -> str:
        """``value`` in this unit, or a dash for None."""
        return MISSING if value is None else f"{value / self.factor:.{self.digits}f}"

    def text(self, value: float | None) -> str:
        """``value`` with the sign."""
        return MISSING if value is None else f"{self.cell(value)} {self.sign}".rstrip()


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Compute the mean and the sample standard deviation, ``sqrt(sum((x - mean)^2) / (m - 1))`` over m values.

    A diverged run is no reason to look better: the mean is NaN where a value is no number, and there is no spread. One
    value has no spread either, and nothing has neither. The mean of whole numbers that is whole stays one.

    >>> mean_and_spread([0.5, 0.75]), mean_and_spread([2, 4]), mean_and_spread([0.5, None]), mean_and_spread([])
    ((0.625, 0.1767766952966369), (3, 1.4142135623730951), (nan, None), (None, None))
    """
    if not values:
        return None, None
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return math.nan, None
    mean = math.fsum(known) / len(known)
    whole = all(isinstance(value, int) for value in known) and mean.is_integer()
    return int(mean) if whole else mean, statistics.stdev(known) if len(known) > 1 else None


def human(value: float | None, scale: Scale) -> str:
    """``value`` in the unit of ``scale`` that suits it alone.

    >>> human(434.7e9, FLOPS), human(41_234, COUNT), human(None, BYTES)
    ('434.7 GFLOP', '41.2 k', '-')
    """
    return Unit.fit([value], scale).text(value)


def ratio(before: float | None, after: float | None) -> str:
    """``after`` against ``before`` in words: ``3.40x less``.

    >>> ratio(1545.0, 455.0), ratio(1.0, 2.0), ratio(5, 5), ratio(None, 2)
    ('3.40x less', '2.00x more', 'the same', '-')
    """
    if before is None or after is None or before <= 0 or after <= 0:
        return MISSING
    if f"{before / after:.2f}" == "1.00":
        return "the same"
    return f"{before / after:.2f}x less" if before > after else f"{after / before:.2f}x more"

"""Wall times on a machine that other work shares: rows take turns, and a disturbed measurement is made again."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STAT = Path("/proc/stat")
# A measurement counts as undisturbed when everything else on the machine had at most this share of its CPU time.
OTHERS = 0.05


def busy_seconds() -> float | None:
    """CPU seconds that the whole machine has worked or been withheld by its host since boot; None where unknown."""
    try:
        fields = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One step: seconds on the wall, CPU seconds of this process, and the share of the machine that others took."""

    wall: float
    cpu: float
    others: float

    @property
    def quiet(self) -> bool:
        return self.others <= OTHERS


def measure(step: Callable[[], None]) -> Sample:
    """Run `step` once."""
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = busy_seconds()
    share = 0.0 if busy is None or after is None else (after - busy - cpu) / (wall * (os.cpu_count() or 1))
    return Sample(wall=wall, cpu=cpu, others=max(0.0, share))


Rows = dict[str, Callable[[], AbstractContextManager[None]]]


def clock(
    rows: Rows, step: Callable[[], None], seconds: float, *, cuda: bool, rounds: int = 3
) -> dict[str, list[Sample]]:
    """Samples of every row, a list of equal length each: round by round, in an order that changes.

    A step runs twice whenever its row comes: once unrecorded, because changing rows costs (compiled kernels, the
    allocator's blocks), and once on the clock. A disturbed sample is made again, as long as there is time for it; after
    `seconds` what comes is taken, until there are `rounds`.
    """

    def timed() -> None:
        step()
        if cuda:
            torch.cuda.synchronize()

    samples: dict[str, list[Sample]] = {name: [] for name in rows}
    order, stop = random.Random(0), time.perf_counter() + seconds
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() < stop:
        for name in order.sample(list(rows), len(rows)):
            with rows[name]():
                timed()
                sample = measure(timed)
                # On a device the host's other work hardly matters.
                while not (cuda or sample.quiet) and time.perf_counter() < stop:
                    time.sleep(min(1.0, max(0.0, stop - time.perf_counter())))
                    sample = measure(timed)
                samples[name].append(sample)
    return samples


def summary(samples: dict[str, list[Sample]], tokens: int, bases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Medians of every row, and how many times faster it is than each of `bases`, as a median of the rounds' ratios."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in samples.items():
        walls = [sample.wall for sample in own]
        quartiles = statistics.quantiles(walls, n=4)
        row: dict[str, Any] = {
            "seconds_median": statistics.median(walls),
            "seconds_quartiles": [quartiles[0], quartiles[2]],
            "cpu_seconds_median": statistics.median(sample.cpu for sample in own),
            "tokens_per_second": tokens / statistics.median(walls),
            "rounds": len(own),
            "disturbed": sum(not sample.quiet for sample in own),
        }
        for base in (base for base in bases if base in samples):
            pairs = list(zip(samples[base], own, strict=True))
            row[f"times_faster_than_{base}"] = statistics.median(theirs.wall / mine.wall for theirs, mine in pairs)
            row[f"cpu_times_faster_than_{base}"] = statistics.median(theirs.cpu / mine.cpu for theirs, mine in pairs)
        found[name] = row
    return found

"""The paper's Figure 3: memory against the number of connected adapters, ours beside PEFT's."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightlora.core import parse_bytes
from weightlora.cost import Estimate, Phase
from weightlora.errors import ConfigError
from weightlora.files import write_text
from weightlora.runs.build import build, make_trainer
from weightlora.runs.config import RunConfig
from weightlora.runs.record import collect_versions, machine
from weightlora.training.budget import estimate_of, longest_rows

CURVE = "memory.json"
PICTURE = "memory.png"


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """What is counted.

    Args:
        run: task, model, adapters and micro-batch. The seed draws the random order of connecting.
        ranks: one pair of curves each.
        points: about so many numbers of connected adapters, from 0 to all n.
        limit: the device's memory, a line in the picture; None: no line.

    Raises:
        ConfigError: a value that is not allowed.
    """

    run: RunConfig
    ranks: tuple[int, ...] = (1, 8, 64)
    points: int = 10
    limit: str | None = None

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ConfigError(f"ranks={','.join(map(str, self.ranks))} must be different ranks of 1 or more, as 1,8,64")
        if self.points < 2:
            raise ConfigError(f"points={self.points} is not allowed; use 2 or more")
        if self.limit is not None:
            parse_bytes(self.limit)


def counts(n: int, points: int) -> list[int]:
    """About `points` numbers of adapters from 0 to n.

    >>> counts(36, 5)
    [0, 9, 18, 27, 36]
    """
    return sorted({round(n * step / (points - 1)) for step in range(points)})


def memory_curve(
    config: CurveConfig, folder: Path, *, argv: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Count the bytes of a training run with the deepest K, and with K adapters at random, for many K.

    Counted are weights, adapters, gradients, AdamW's moments, and what autograd keeps of a micro-batch of the task's
    longest rows, as it is at the end of a forward pass: exact, and the same on any machine. What an allocator rounds up
    and a kernel's workspace come on top. PEFT is its own forward with the same adapters disconnected.

    Args:
        config: what to count.
        folder: ``memory.json`` goes there, whole or not at all.
        argv: the command line, for the file.
        say: takes a line of progress.

    Returns:
        What lies in ``memory.json``: one entry per path, order, rank and K in ``"records"``.

    Raises:
        WeightLoRAError: the settings cannot work.

    Source: paper, section 3.2 and Figure 3. Departs from it: counted and not read off a device, since the authors' code
    disconnects nothing and adds a constant to what it measures; the deepest K beside random ones.

    """
    records: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for rank in config.ranks:
        run = config.run.with_settings(r=rank, alpha=config.run.alpha * rank / config.run.r, method="lora", settings={})
        parts = build(run)
        with tempfile.TemporaryDirectory(prefix="weightlora-memory-") as scratch:
            trainer = make_trainer(parts, run, Path(scratch), [])
            size = trainer.args.per_device_train_batch_size
            for path, stock in (("ours", False), ("stock", True)):
                found = estimate_of(trainer, stock=stock)
                records += _points(found, config, {"path": path, "rank": rank}, size)
                say(f"rank {rank}, {'PEFT' if stock else 'ours'}: {found.n} adapters counted")
        facts = {"n_adapters": found.n, "micro_batch": size, "fixed_bytes": found.fixed}
        facts["length"] = max(len(row["input_ids"]) for row in longest_rows(trainer))
    data = {
        "task": config.run.task, "model": config.run.model, "seed": config.run.seed, **facts,
        "limit_bytes": None if config.limit is None else parse_bytes(config.limit), "records": records,
        "config": config.run.to_dict(), "versions": collect_versions(), "machine": machine(),
        "argv": list(argv) or sys.argv,
    }  # fmt: skip
    write_text(folder / CURVE, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return data


def _points(found: Estimate, config: CurveConfig, about: dict[str, Any], size: int) -> list[dict[str, Any]]:
    n, state = found.n, found.state()
    orders = {"deepest": list(range(n))[::-1], "random": random.Random(config.run.seed).sample(range(n), n)}
    points = []
    for order, sequence in orders.items():
        for k in counts(n, config.points):
            cost = found.cost(Phase(name="final", live=tuple(sequence[:k])), size)
            points.append(
                {
                    **about, "order": order, "k": k, "kept_activation_bytes": cost.activations + cost.recomputed,
                    "adapter_state_bytes": sum(state[i] for i in sequence[:k]), "total_bytes": cost.held,
                }
            )  # fmt: skip
    return points

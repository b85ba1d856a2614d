"""The paper's Figure 3: memory against the number of connected adapters, ours beside PEFT's."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from weightlora.core.sizes import parse_bytes
from weightlora.cost import Estimate, Phase
from weightlora.files import write_text
from weightlora.runs.build import build, make_trainer
from weightlora.runs.figure_specs import CurveSpec
from weightlora.runs.record import collect_versions, machine
from weightlora.training.budget import estimate_of, longest_rows

CURVE = "memory.json"
PICTURE = "memory.png"


def counts(n: int, points: int) -> list[int]:
    """About `points` numbers of adapters from 0 to n.

    >>> counts(36, 5)
    [0, 9, 18, 27, 36]
    """
    return sorted({round(n * step / (points - 1)) for step in range(points)})


def memory_curve(
    config: CurveSpec, folder: Path, *, argv: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, object]:
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
    records: list[dict[str, object]] = []
    facts: dict[str, object] = {}
    for rank in config.ranks:
        alpha = config.run.model.alpha * rank / config.run.model.r
        run = config.run.but(r=rank, alpha=alpha, method="lora", settings={})
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
        "task": config.run.task.name, "model": config.run.model.name, "seed": config.run.training.seed, **facts,
        "limit_bytes": None if config.limit is None else parse_bytes(config.limit), "records": records,
        "config": config.run.to_dict(), "versions": collect_versions(), "machine": machine(),
        "argv": list(argv) or sys.argv,
    }  # fmt: skip
    write_text(folder / CURVE, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return data


def _points(found: Estimate, config: CurveSpec, about: dict[str, object], size: int) -> list[dict[str, object]]:
    n, state = found.n, found.state()
    orders = {"deepest": list(range(n))[::-1], "random": random.Random(config.run.training.seed).sample(range(n), n)}
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

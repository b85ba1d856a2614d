"""What each phase of a run will keep and train, said before its first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

from transformers import Trainer

from weightlora.cost import ActivationTrace, Estimate, Phase, Setting
from weightlora.cost.results import FrontierPoint
from weightlora.errors import AdapterError, WeightLoRAError
from weightlora.graft.depth import checkpointed_every
from weightlora.graft.selection import Selection
from weightlora.training.driver import Driver
from weightlora.training.trainer import checkpointing_settings, operations_of_step, trace_step, use_batch

log = logging.getLogger("weightlora")
POINTS = 20  # of a frontier


class Predictor:
    """Say what warm-up keeps, and once the survivors are known, what the final phase keeps with them.

    One forward per micro-batch size is traced, of the model with every adapter live, before anything trains. Methods
    whose adapters compute in a form of their own, or are tied, are not predicted, nor are models that cannot be traced.
    Where some survive as they are, one pass of the base is counted, too, for the frontier.

    Args:
        trainer: its model has all adapters, and its arguments the batch of the run.
        driver: not started yet.
        batches: (micro-batch, accumulation) before and after the seam; None: what the arguments say.
        stock: adapters compute by PEFT's own forward.
    """

    def __init__(
        self, trainer: Trainer, driver: Driver, batches: Sequence[tuple[int, int] | None], stock: bool
    ) -> None:
        args, setup = trainer.args, driver.policy.setup
        usual = args.per_device_train_batch_size, args.gradient_accumulation_steps
        splits = [batches[0] or usual, batches[1] or batches[0] or usual]
        on, every = checkpointing_of(trainer)
        self.sizes, self.seam = [size for size, _ in splits], driver.seam
        self.accumulation = splits[1][1]
        self.operations: Callable[[Iterable[int]], int] | None = None
        self.index = {a.name: a.index for a in driver.adapters}
        self.whole = Phase(
            name="final" if self.seam is None else "warmup",
            live=tuple(range(len(self.index))),
            ranks=setup.starting_ranks(),
            gated=setup.gates != "none",
            trains_gates=setup.gates == "learn",
            inputs=on,
        )
        self.estimate: Estimate | None = None
        if setup.form is not None or setup.ties:
            return
        traces: dict[int, ActivationTrace] = {}
        try:
            for split in splits:
                use_batch(trainer, split)
                traced = traces.get(split[0]) or trace_step(trainer, stock=stock)
                if traced is None:  # without a batch
                    return
                traces[split[0]] = traced
            # Survivors that grow cost more than these ranks; without a look at step 0 nothing has a score.
            if (self.seam or (self.seam == 0 and setup.look)) and not on and not driver.method.needs.grows:
                self.operations = _operations(trainer)
        except AdapterError as error:
            log.info("costs are not predicted: %s", error)
            return
        finally:
            use_batch(trainer, usual)
        self.estimate = Estimate(driver.model, traces.__getitem__, Setting(checkpointing=on, every_n_layers=every))
        if self.seam != 0:
            kept = self._said(self.whole, self.sizes[0])["kept_activation_bytes"]
            log.info(
                "with all of them, a forward pass of %s examples keeps %.1f MiB for backward",
                splits[0][0],
                kept / 2**20,
            )

    def tell(self, selection: Selection | None) -> None:
        """Log what the survivors of the seam keep."""
        if self.seam is not None and (final := self.phases(selection).get("final")):
            size, kept = self.sizes[1], final["kept_activation_bytes"]
            log.info("with these, a forward pass of %s examples keeps %.1f MiB for backward", size, kept / 2**20)

    def phases(self, selection: Selection | None) -> dict[str, dict[str, int]]:
        """``{phase: {field of a phase: number}}``; nothing where there was nothing to trace.

        Args:
            selection: who survived.
        """
        if self.estimate is None:
            return {}
        before = {} if self.seam == 0 else {self.whole.name: self._said(self.whole, self.sizes[0])}
        placed = None if selection is None or selection.placement is None else selection.placement["micro_batch"]
        # A budget may have made the micro-batch smaller than what was traced.
        if self.seam is None or selection is None or placed not in (None, self.sizes[1]):
            return before
        ranks = {self.index[c.name]: c.rank for c in selection.kept}
        inputs = self.whole.inputs and len(ranks) == len(self.index)
        final = self._said(Phase(name="final", live=tuple(ranks), ranks=ranks, inputs=inputs), self.sizes[1])
        if selection.groups:
            del final["trainable_params"]  # shared factors train once
        return {**before, "final": final}

    def frontier(self, selection: Selection | None) -> list[FrontierPoint]:
        """What the best k by score hold of the total score, and what a step with them costs, for some twenty k.

        Nothing without scores, or where nothing was traced.

        Args:
            selection: whose scores rank.
        """
        if self.estimate is None or selection is None or self.seam is None:
            return []
        scores = [0.0 if c.score is None else max(c.score, 0.0) for c in selection.choices]
        total, n = math.fsum(scores), len(scores)
        if not 0 < total < math.inf:
            return []
        order = sorted(range(n), key=lambda i: -scores[i])
        counts = sorted({max(1, round(n ** (step / (POINTS - 1)))) for step in range(POINTS)})
        return [
            FrontierPoint(
                k=k,
                share=math.fsum(scores[i] for i in order[:k]) / total,
                kept_activation_bytes=self.estimate.activations(
                    Phase(name="final", live=tuple(order[:k]), inputs=self.whole.inputs and k == n), self.sizes[1]
                ),
                flops_per_step=None if self.operations is None else self.operations(order[:k]) * self.accumulation,
            )
            for k in counts
        ]

    def _said(self, phase: Phase, size: int) -> dict[str, int]:
        assert self.estimate is not None
        return {
            "kept_activation_bytes": self.estimate.activations(phase, size),
            "trainable_params": self.estimate.trainable_params(phase),
        }


def _operations(trainer: Trainer) -> Callable[[Iterable[int]], int] | None:
    """Operations of the micro-batch of the arguments, for any set; None where they cannot be counted."""
    try:
        return operations_of_step(trainer)
    except WeightLoRAError as error:
        log.info("operations are not predicted: %s", error)
        return None


def checkpointing_of(trainer: Trainer) -> tuple[bool, int]:
    """Whether blocks are checkpointed, by the arguments or on the model already, and every how many-th."""
    settings, model = checkpointing_settings(trainer), trainer.model
    if settings is None:
        every = checkpointed_every(model)  # type: ignore[arg-type]
        return every > 0, max(1, every)
    return True, int(settings.get("every_n_layers", 1))

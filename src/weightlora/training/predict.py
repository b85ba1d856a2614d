"""What each phase of a run will keep and train, said before its first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer

from weightlora.cost import ActivationTrace
from weightlora.errors import AdapterError
from weightlora.graft import Selection, checkpointed_every
from weightlora.methods import Policy
from weightlora.training.driver import Driver
from weightlora.training.trainer import trace_step, use_batch

log = logging.getLogger("weightlora")


class Predictor:
    """One traced forward per micro-batch size, of the model with every adapter live, before anything trains.

    From it follows what warm-up keeps, and once the survivors are known, what the final phase keeps with them. Methods
    whose adapters compute in a form of their own, or are tied, are not predicted, nor are models that cannot be traced.

    Args:
        trainer: its model has all adapters, and its arguments the batch of the run.
        driver: not started yet.
        batches: (micro-batch, accumulation) before and after the seam; None: what the arguments say.
        stock: adapters compute by PEFT's own forward.
    """

    def __init__(
        self, trainer: Trainer, driver: Driver, batches: Sequence[tuple[int, int] | None], stock: bool
    ) -> None:
        policy = driver.policy
        self.adapters, self.gated, self.seam = driver.adapters, policy.gated, policy.seam
        self.trains_gates = policy.trains_gates
        self.traces: list[ActivationTrace | None] = [None, None]
        self.sizes: list[int] = []
        self.checkpointing, self.every = checkpointing_of(trainer)
        room = policy.allocate()
        self.ranks = {} if room is None else {i: rank for i, (rank, _) in enumerate(room)}
        parameters = {id(p): p for p in driver.model.parameters() if p.requires_grad}
        own = sum(a.rank * (a.d_in + a.d_out) for a in self.adapters)
        self.others = sum(p.numel() for p in parameters.values()) - own
        if type(policy).form is Policy.form and not policy.ties():
            self._trace(trainer, batches, stock)

    def _trace(self, trainer: Trainer, batches: Sequence[tuple[int, int] | None], stock: bool) -> None:
        args = trainer.args
        usual = args.per_device_train_batch_size, args.gradient_accumulation_steps
        found: dict[int, ActivationTrace | None] = {}
        splits = [batches[0] or usual, batches[1] or batches[0] or usual]
        self.sizes = [size for size, _ in splits]
        try:
            for phase, split in enumerate(splits):
                use_batch(trainer, split)
                if split[0] not in found:
                    found[split[0]] = trace_step(trainer, stock=stock)
                self.traces[phase] = found[split[0]]
        except AdapterError as error:
            log.info("costs are not predicted: %s", error)
        finally:
            use_batch(trainer, usual)

    def phases(self, selection: Selection | None) -> dict[str, dict[str, int]]:
        """``{phase: {field of a phase: number}}``; nothing where there was nothing to trace.

        Args:
            selection: who survived.
        """
        if None in self.traces:
            return {}
        every = range(len(self.adapters))
        whole = self._phase(0, every, self.ranks, gated=self.gated, inputs=self.checkpointing)
        if self.seam is None:
            return {"final": whole}
        before = {"warmup": whole} if self.seam else {}
        if selection is None:
            return before
        placed = None if selection.placement is None else selection.placement["micro_batch"]
        if placed not in (None, self.sizes[1]):
            return before  # a budget made the micro-batch smaller than what was traced
        index = {a.name: a.index for a in self.adapters}
        ranks = {index[c.name]: c.rank for c in selection.kept}
        inputs = self.checkpointing and len(ranks) == len(every)
        final = self._phase(1, ranks, ranks, gated=False, inputs=inputs)
        if selection.groups:
            del final["trainable_params"]  # shared factors train once
        return {**before, "final": final}

    def _phase(self, number: int, live: Any, ranks: Mapping[int, int], *, gated: bool, inputs: bool) -> dict[str, int]:
        trace, n = self.traces[number], len(self.adapters)
        assert trace is not None
        kept = trace.kept(live, ranks=ranks, checkpointing=self.checkpointing, every_n_layers=self.every, inputs=inputs)
        trained = sum(
            (self.adapters[i].d_in + self.adapters[i].d_out) * ranks.get(i, self.adapters[i].rank) for i in live
        )
        return {
            # Every gated layer keeps its number, and with it the one vector they all lie in.
            "kept_activation_bytes": kept + (4 * n if gated else 0),
            "trainable_params": self.others + trained + (n if gated and self.trains_gates else 0),
        }


def checkpointing_of(trainer: Trainer) -> tuple[bool, int]:
    """Whether blocks are checkpointed, by the arguments or on the model already, and every how many-th."""
    args: Any = trainer.args
    model: Any = trainer.model
    on = bool(getattr(args, "activation_checkpointing", args.gradient_checkpointing))
    if not on:
        every = checkpointed_every(model)
        return every > 0, max(1, every)
    settings = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    return on, int(settings.get("every_n_layers", 1))

"""ALoRA: rounds in which the least important ranks are switched off and modules that lost none receive new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weightlora.core.budget import total_params
from weightlora.core.rounds import one_round
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.forms import Form, RankGates
from weightlora.methods.base import Needs
from weightlora.methods.budgets import SpendingMethod
from weightlora.methods.checks import check_warmup
from weightlora.methods.policy import Decision, Factors, Fresh, Policy, Setup, StepView, slope
from weightlora.settings import setting

Scoring = Literal["exact", "gradient"]


@dataclass(frozen=True, kw_only=True)
class ALoRA(SpendingMethod):
    """``dW = s B diag(c) A`` with frozen gates c in {0, 1}; a score per rank decides, no gate is ever learnt.

    With S minus the loss on a held-out batch, ``IS(r) = S(M) - S(M without r) + S(M with r alone)``. In each round the
    `moves` lowest ranks of the whole model go; the modules that lost none share as many new ones.

    Args:
        select_after: K1, before the first round: optimizer steps or a share of the run.
        round_steps: K2, from one round to the next: the same.
        rounds: N_A. The seam is right after the last one; training goes on with what is left.
        moves: n_A, ranks that go in a round; None: the number of kinds of modules, or fewer where all rounds together
            would take every rank.
        scoring: "exact": two forward passes per rank; "gradient": two backward passes in all, the first-order
            ``-dL/dc_r`` with all live ranks on plus ``-dL/dc_r`` with all off (ours).
        max_rank: of a module; None: twice what it starts with.
        spend: parameters that all ranks together may cost; None: their number alone is held, and those that move to
            larger layers cost more (`--params` sets it).
        batches: held-out batches; each round scores on one, in turn.
        seed: of the generator that draws new rows of A.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: Liu et al. 2024. Departs in the cap on ranks, in having no early stopping, and in that a module without any
    rank left receives none.

    >>> ALoRA(rounds=4).scoring
    'gradient'
    """

    name: ClassVar[str] = "alora"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        # 1 epoch, then 8 rounds of a quarter: 3 in all.
        "paper": {"select_after": 1 / 3, "round_steps": 1 / 12, "rounds": 8, "scoring": "exact"},
    }
    chooses_k: ClassVar[bool] = True
    in_shares: ClassVar[tuple[str, ...]] = ("select_after", "round_steps")

    select_after: int | float = 0.1
    round_steps: int | float = 0.025
    rounds: int = setting(8, least=1)
    moves: int | None = setting(None, least=1)
    scoring: Scoring = "gradient"
    max_rank: int | None = setting(None, least=1)
    batches: int = setting(1, least=1)
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(held_out=self.batches)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> ALoRAPolicy:
        return ALoRAPolicy(self, adapters, max_steps)


class ALoRAPolicy(Policy):
    """Moves ranks in rounds; see :class:`ALoRA`."""

    gates: RankGates

    def __init__(self, method: ALoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.method = method
        self.first = check_warmup(method.select_after, max_steps)
        self.every = check_warmup(method.round_steps, max_steps, "round_steps")
        self.seam = self.first + (method.rounds - 1) * self.every
        if self.seam >= max_steps:
            raise ScheduleError(
                f"the last of {method.rounds} rounds would be at step {self.seam} of {max_steps};"
                " lower rounds, round_steps or select_after, or train longer"
            )
        ranks = sum(a.rank for a in adapters)
        spare = max(1, (ranks - 1) // method.rounds)  # a small budget has few ranks to move
        self.moves = min(spare, len({a.kind for a in adapters})) if method.moves is None else method.moves
        if method.rounds * self.moves >= ranks:
            raise ScheduleError(
                f"{method.rounds} rounds of {self.moves} ranks could take all {ranks} away; lower rounds or moves"
            )
        self.room = [max(a.rank, method.max_rank or 2 * a.rank) for a in adapters]
        self.setup = Setup(
            ranks=[(room, a.scale) for room, a in zip(self.room, adapters, strict=True)], form=self._form
        )
        self.generator = torch.Generator().manual_seed(method.seed)
        self.means = torch.zeros(len(adapters), dtype=torch.float64)
        self.trained = total_params([a.rank for a in adapters], [a.shape for a in adapters])  # at the most

    def _form(self, factors: Factors) -> Form:
        self.gates = RankGates(self.room, value=1.0, trainable=False, device=factors[0][0].device)
        on = [rank < a.rank for a, room in zip(self.adapters, self.room, strict=True) for rank in range(room)]
        self.gates.set(torch.tensor(on, dtype=torch.float32))
        return self.gates

    def observe(self, view: StepView) -> Sequence[Fresh]:
        past = view.step - self.first
        if past < 0 or past % self.every:
            return ()
        assert view.held_out is not None
        batch = past // self.every % len(view.held_out)
        scores = (exact_scores if self.method.scoring == "exact" else gradient_scores)(view, batch)
        if not bool(scores.isfinite().all()):
            raise ScheduleError(
                f"scores at step {view.step} are not finite: training diverged; lower the learning rate"
            )
        return self._move(view.factors, scores)

    def _move(self, factors: Factors, scores: Tensor) -> list[Fresh]:
        """One round, given the score of every rank."""
        live, values = self.gates.live(), self.gates.values.detach().clone()
        parts = [part[ranks].tolist() for part, ranks in zip(scores.split_with_sizes(self.room), live, strict=True)]
        self.means = torch.tensor([sum(part) / max(1, len(part)) for part in parts], dtype=torch.float64)
        costs = [a.d_in + a.d_out for a in self.adapters]
        gone, came = one_round(live, parts, self.moves, self.room, costs, self.method.spend)
        for i, first in enumerate(self.gates.bounds[:-1]):
            for rank in gone[i]:
                values[first + rank] = 0.0
            for rank in came[i]:
                self._start(factors[i], rank)
                values[first + rank] = 1.0
        self.gates.set(values)
        live = self.gates.live()
        self.trained = max(self.trained, sum(len(ranks) * cost for ranks, cost in zip(live, costs, strict=True)))
        changed = [(i, gone[i] or came[i]) for i in range(len(live))]  # a module that loses receives nothing
        return [Fresh(index=i, ranks=tuple(ranks)) for i, ranks in changed if ranks]

    def _start(self, pair: tuple[Tensor, Tensor], rank: int) -> None:
        """A new rank: A normal with the variance of LoRA's own start, B zero, so that the output does not change."""
        A, B = pair
        row = torch.randn(A.shape[1], generator=self.generator) / (3 * A.shape[1]) ** 0.5
        with torch.no_grad():
            A[rank].copy_(row)
            B[:, rank].zero_()

    def decide(self, omegas: Sequence[float]) -> Decision:
        live = self.gates.live()
        kept = [i for i, ranks in enumerate(live) if ranks]
        total, start = sum(map(len, live)), sum(a.rank for a in self.adapters)
        why = (
            f"{total} of {start} ranks on {len(kept)} adapters after {self.method.rounds} rounds of {self.moves},"
            f" {self.method.scoring} importance"
        )
        selection = self.method.choose(self.adapters, kept, why, step=self.seam, scores=self.means.tolist())
        return Decision(selection=selection, peak=self.trained)

    def state(self) -> dict[str, Tensor]:
        trained = torch.tensor(self.trained)
        return {"means": self.means.clone(), "generator": self.generator.get_state(), "trained": trained}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.means, self.trained = state["means"].clone(), int(state["trained"])
        self.generator.set_state(state["generator"])


def exact_scores(view: StepView, batch: int) -> Tensor:
    """IS of every rank that is on, ``(sum r,)`` float64; 0 for the others. Gates are left as they were."""
    assert view.held_out is not None
    gates, held_out = view.ranks, view.held_out
    found, scores = gates.values.detach().clone(), torch.zeros(len(gates.values), dtype=torch.float64)

    def quality(values: Tensor) -> float:
        gates.set(values)
        return -float(held_out.loss(batch))

    with torch.no_grad():
        try:
            whole = quality(found)
            for rank in torch.nonzero(found).flatten().tolist():
                without, alone = found.clone(), torch.zeros_like(found)
                without[rank], alone[rank] = 0.0, found[rank]
                scores[rank] = whole - quality(without) + quality(alone)
        finally:
            gates.set(found)
    return scores


def gradient_scores(view: StepView, batch: int) -> Tensor:
    """The first-order part of IS: ``-dL/dc`` with the gates as they are, plus ``-dL/dc`` with all at 0."""
    assert view.held_out is not None
    gates = view.ranks
    found = gates.values.detach().clone()
    total = -slope(view.held_out, batch, gates.values)
    try:
        gates.set(torch.zeros_like(found))
        total = total.double() - slope(view.held_out, batch, gates.values)
    finally:
        gates.set(found)
    return (total * (found != 0)).cpu()

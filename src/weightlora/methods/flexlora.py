"""FlexLoRA (Bai et al., federated): clients of different ranks, averaged by the server as full updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.merging import svd_merge
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.forms import Form, RankGates
from weightlora.methods.base import AdapterMethod
from weightlora.methods.policy import Decision, Factors, Fresh, HeldOut, Policy, Setup, StepView, Weights
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(AdapterMethod):
    """Federated LoRA with a rank per client, all clients simulated in this one process, one after the other.

    ``dW = sum_i w_i s B_i A_i``; its SVD gives client i ``B = U_r S_r / s``, ``A = V_r^T`` in its own rank r_i.

    Not the entropy-guided FlexLoRA of Liu et al. 2026 (arXiv 2601.22905), which moves ranks between layers.

    Args:
        clients: how many. rounds: how often the server averages. Both share the run's steps out evenly.
        ranks: r_i of each client; None: the model's r for all, where one round is LoRA with its factors re-balanced.

    Departures: clients see disjoint batches of one shuffled set (the same distribution), their weights are their
    steps; the head is not averaged but handed from client to client; clients of different ranks have one common scale
    s, that of the model as built (the source divides alpha by each client's own rank).

    Source: Bai et al. 2024. Not `flexora` (Wei et al.), which selects layers.
    """

    name: ClassVar[str] = "flexlora"
    rate: ClassVar[float] = 3.0  # measured; see docs/methods.md

    clients: int = setting(4, least=1)
    rounds: int = setting(4, least=1)
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (len(self.ranks) != self.clients or min(self.ranks) < 1):
            raise ConfigError(f"ranks={list(self.ranks)} must be {self.clients} numbers of 1 or more, one per client")

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> FlexLoRAPolicy:
        return FlexLoRAPolicy(self, adapters, max_steps)


class FlexLoRAPolicy(Policy):
    """Hands the adapters from client to client and averages after each round; see :class:`FlexLoRA`."""

    def __init__(self, method: FlexLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.method = method
        turns = method.clients * method.rounds
        if max_steps < turns:
            raise ScheduleError(
                f"{method.rounds} rounds of {method.clients} clients need {turns} optimizer steps or more, and the run"
                f" has {max_steps}; use fewer rounds or train longer"
            )
        # The last step of each client's turn.
        self.ends = [(turn + 1) * max_steps // turns for turn in range(turns)]
        self.ranks = method.ranks or (max(a.rank for a in adapters),) * method.clients
        self.setup = Setup(
            ranks=[(max(self.ranks), a.scale) for a in adapters],
            start=self._start,
            form=self._form if len(set(self.ranks)) > 1 else None,
        )
        self.server: list[tuple[Tensor, Tensor]] = []  # where every client of the round starts, one pair an adapter
        self.done: list[list[tuple[Tensor, Tensor]]] = []  # what the round's clients came to

    def _start(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for (A, _), adapter in zip(factors, self.adapters, strict=True):
                if A.shape[0] > adapter.rank:  # the rows that the model as built did not have
                    start = torch.rand(A.shape[0] - adapter.rank, A.shape[1], generator=generator)
                    A[adapter.rank :] = (2 * start - 1) / A.shape[1] ** 0.5
        self.server = [(A.detach().clone(), B.detach().clone()) for A, B in factors]

    def _form(self, factors: Factors) -> Form:
        gates = RankGates([max(self.ranks)] * len(factors), value=1.0, trainable=False, device=factors[0][0].device)
        self._open(gates, self.ranks[0])
        return gates

    def observe(self, view: StepView) -> Sequence[Fresh]:
        if view.step not in self.ends:
            return ()
        turn = self.ends.index(view.step)
        rank = self.ranks[turn % self.method.clients]
        self.done.append([(A.detach()[:rank].clone(), B.detach()[:, :rank].clone()) for A, B in view.factors])
        if len(self.done) == self.method.clients:
            self._average(turn)
        last = turn + 1 == len(self.ends)
        coming = max(self.ranks) if last else self.ranks[(turn + 1) % self.method.clients]
        with torch.no_grad():
            for (A, B), (server_A, server_B) in zip(view.factors, self.server, strict=True):
                A.zero_()
                B.zero_()
                A[:coming], B[:, :coming] = server_A[:coming].to(A), server_B[:, :coming].to(B)
        if view.form is not None:
            self._open(view.ranks, coming)
        return [Fresh(index=index) for index in range(len(self.adapters))]

    def _average(self, turn: int) -> None:
        """The server's step: the clients' updates, weighted by their steps, in the largest rank."""
        first = turn + 1 - self.method.clients
        starts = [0, *self.ends][first : turn + 1]
        steps = [end - start for start, end in zip(starts, self.ends[first : turn + 1], strict=True)]
        weights = [count / sum(steps) for count in steps]
        self.server = [svd_merge(list(pairs), weights, max(self.ranks)) for pairs in zip(*self.done, strict=True)]
        self.done = []

    @staticmethod
    def _open(gates: RankGates, rank: int) -> None:
        width = gates.bounds[1]
        gates.set((torch.arange(gates.values.numel(), device=gates.values.device) % width < rank).float())

    def decide(self, omegas: Sequence[float]) -> Decision:
        clients = f"{self.method.clients} clients of ranks {', '.join(map(str, self.ranks))}"
        why = f"the server's average of {clients} after {self.method.rounds} rounds"
        return Decision(selection=self.method.keep_all(self.adapters, why))

    def state(self) -> dict[str, Tensor]:
        rows = {"server": self.server} | {f"client.{c}": pairs for c, pairs in enumerate(self.done)}
        return {
            f"{who}.{key}.{i}": factor
            for who, pairs in rows.items()
            for i, pair in enumerate(pairs)
            for key, factor in zip("AB", pair, strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def pairs(who: str) -> list[tuple[Tensor, Tensor]]:
            return [(state[f"{who}.A.{i}"].clone(), state[f"{who}.B.{i}"].clone()) for i in range(len(self.adapters))]

        self.server, self.done = pairs("server"), []
        while f"client.{len(self.done)}.A.0" in state:
            self.done.append(pairs(f"client.{len(self.done)}"))

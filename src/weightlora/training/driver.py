"""One run's decisions applied to a live model: what a callback and a plain loop both call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from weightlora.errors import ScheduleError
from weightlora.graft.adapters import adapter_name, adapters, layer_weights, parameters, refuse_tied
from weightlora.graft.depth import GradientCheck, end_backward_at_lowest
from weightlora.graft.fast import PathName, check_path, fast_path, stock_path
from weightlora.graft.forms import Formed, Gates, RankGates
from weightlora.graft.optimizer import Change, adopt, forget, remap
from weightlora.graft.quantised import keep_unpacked, whole_weights
from weightlora.graft.selection import Selection
from weightlora.graft.start import load_start_state, start_state
from weightlora.graft.surgery import disconnect, grow_adapters, resize, restart, tie
from weightlora.graft.watch import ProductWatch
from weightlora.methods import AdapterMethod, Budget, Fresh, HeldOut, StepView
from weightlora.methods.checks import check_k
from weightlora.training.finite import FiniteWatch, check_learned, check_numbers
from weightlora.training.initial import look_before
from weightlora.training.processes import mean_over_processes
from weightlora.training.unreached import no_gradient

log = logging.getLogger("weightlora")
UNKNOWN_LENGTH = 2**31  # steps of a loop that does not say how long it is


class Driver:
    """Carries a method's policy through the steps of a run and performs its surgery.

    Args:
        model: a model with LoRA adapters; taken over from here on.
        method: what is wanted.
        max_steps: optimizer steps of the whole run.
        engine: how adapters compute, as :func:`weightlora.fit`.
        held_out: batches that the run does not train on, for a method that looks at some.
        budget: what survivors may cost, for a method with a limit.

    Raises:
        AdapterError, ConfigError, ScheduleError: before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        method: AdapterMethod,
        max_steps: int,
        engine: PathName = "auto",
        held_out: HeldOut | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.method, self.engine, self.held_out = model, method, engine, held_out
        self.gated_engine = check_path(engine)
        self.name = adapter_name(model)
        self.adapters = adapters(model, self.name)
        refuse_tied(self.adapters)
        needs = method.needs
        if needs.held_out and held_out is None:
            raise ScheduleError(f"{method.name} needs batches that the run does not train on; pass them as held_out=")
        if needs.limit is not None and budget is None and not needs.limit.assumed:
            raise ScheduleError(
                f"{needs.limit.kind} has to be counted on the run's batches, which attach does not know; use fit"
                " with a trainer, or k"
            )
        self.policy = method.begin(self.adapters, max_steps)
        look_before(model, self.name, method, self.policy)
        if self.policy.setup.check is not None:
            self.policy.setup.check(layer_weights(model, self.name))
        self.policy.budget = budget
        self.formed: Formed | None = None
        self.watch: ProductWatch | None = None
        self.check: GradientCheck | None = None
        self.selection: Selection | None = None
        self.counts: dict[str, int] = {}  # numbers in adapters; see FitResult
        self.step = 0
        self._before: tuple[tuple[Tensor, Tensor], ...] = ()  # the step: copies of all factors
        self._withheld: list[tuple[Tensor, Tensor | None]] = []  # from the optimizer: gradients of these factors
        self.finite = FiniteWatch(model)
        keep_unpacked(model)
        log.info("%s", self._outlook(max_steps))

    def _outlook(self, max_steps: int) -> str:
        """What will happen to the adapters, in one line."""
        n, needs = len(self.adapters), self.method.needs
        of = f" of {max_steps}" if max_steps < UNKNOWN_LENGTH else ""
        if self.seam is None:
            return f"{n} adapters train in every step{of}"
        stay = "those stay that the method keeps"
        if needs.limit is not None:
            stay = f"those stay that {needs.limit.kind} of {needs.limit.said} allows"
        elif needs.k is not None:
            k = check_k(needs.k, self.adapters)
            stay = f"{k} stay and {n - k} are removed"
        if self.seam == 0:
            return f"{n} adapters: before the first step{of} {stay}"
        return f"{n} adapters train until step {self.seam}{of}; then {stay}"

    @property
    def gates(self) -> Gates | None:
        """The omega vector, while there is one."""
        return self.formed if isinstance(self.formed, Gates) else None

    @property
    def seam(self) -> int | None:
        """The optimizer step after which surgery happens; 0: before training; None: never."""
        return self.policy.seam

    def start(self, optimizer: torch.optim.Optimizer | None = None, *, fresh: bool = True) -> None:
        """Give the adapters the ranks, ties, gates and form that the method needs.

        Args:
            optimizer: follows, where there is one already.
            fresh: also set initial values (not when resuming).
        """
        look = self.policy.setup.look
        if fresh and look is not None:
            look(whole_weights(self.model, self.name), self.held_out)
        setup, names = self.policy.setup, [adapter.name for adapter in self.adapters]
        changes: dict[nn.Parameter, Change] = {}
        if setup.ranks:
            ranks, scales = zip(*setup.ranks, strict=True)
            changes |= resize(
                self.model, dict(zip(names, ranks, strict=True)), dict(zip(names, scales, strict=True)), self.name
            )
        changes |= tie(self.model, [[names[i] for i in group] for group in setup.ties], self.name)
        remap(optimizer, changes)
        self._factors = tuple(parameters(self.model, self.name).values())
        if fresh and setup.start is not None:
            setup.start(self._factors, layer_weights(self.model, self.name), self.held_out)
        form = None if setup.form is None else setup.form(self._factors)
        if form is not None:
            self.formed = Formed(self.model, form, self.name, engine_name=self.gated_engine)
            adopt(optimizer, list(form.parameters().values()), self.model)
        if self.policy.watches:
            self.watch = ProductWatch(self.model, self.name)
        own = {p for pair in self._factors for p in pair} | set(() if form is None else form.parameters().values())
        gates = len(names) if setup.gates == "learn" else 0
        self.counts = {
            "allocated": gates + sum(p.numel() for p in own),
            "trainable": gates + sum(p.numel() for p in own if p.requires_grad),
        }
        if setup.gates != "none":
            self.formed = Gates(self.model, self.name, trainable=setup.gates == "learn", engine_name=self.gated_engine)
        elif form is None:
            self.ride()
        self.finite.renew()

    def ride(self) -> None:
        """Put the plain adapters on the adapter path."""
        if self.engine != "stock":
            fast_path(self.model, self.name, self.gated_engine)
        self.finite.renew()

    def finish(self, optimizer: torch.optim.Optimizer | None) -> Selection:
        """The end of the run: select now if the method never did, and leave stock PEFT layers."""
        self.finite.check()
        selection = self.selection or self.operate(optimizer)
        self.let_go()
        self.counts["effective"] = self.policy.setup.count(adapters(self.model, self.name))
        return selection

    def let_go(self) -> None:
        """Leave stock PEFT layers, whatever has happened: before the seam with all adapters, gates folded in."""
        if self.formed is not None:
            self.formed.fold()
            self.formed = None
        self._end_watch()
        if self.check is not None:
            self.check.close()
            self.check = None
        stock_path(self.model, self.name)

    def _end_watch(self) -> None:
        if self.watch is not None:
            self.watch.close()
        self.watch = None

    def settle(self) -> None:
        """Let the backward pass end at the lowest adapter, where some are gone. Again after anyone has switched
        gradient checkpointing on."""
        removed = end_backward_at_lowest(self.model) if self.survivors else 0
        if removed:
            log.info(
                "embeddings' outputs need no gradient any more (%d hooks removed): backward ends at the lowest adapter",
                removed,
            )

    @property
    def survivors(self) -> tuple[str, ...]:
        """Who must get gradients from here on: after the seam, where some adapters are gone."""
        return () if self.selection is None or self.selection.k == self.selection.n else self.selection.names

    def expect_gradients(self, *, compiled: bool = False) -> None:
        """From the next step on the survivors train: see to it, once, that a gradient reaches each of them."""
        self.settle()
        if self.survivors and self.check is None:
            self.check = GradientCheck(self.model, self.name, watched=not compiled)

    def _check_gradients(self) -> None:
        if self.check is None:
            return
        unreached = self.check.unreached()
        self.check = None
        if unreached:
            raise no_gradient(unreached, self.step + 1)

    def _view(self, lr_factor: float) -> StepView:
        return StepView(
            step=self.step + 1,
            lr_factor=lr_factor,
            factors=self._factors,
            gates=self.gates,
            form=None if self.formed is None else self.formed.form,
            before=self._before,
            products=None if self.watch is None else self.watch.products,
            held_out=self.held_out,
        )

    def _add_penalty(self, view: StepView) -> None:
        """Add the gradient of the method's own term to those of the loss."""
        penalty = self.policy.setup.penalty
        term = None if penalty is None else penalty(view)
        if term is None:
            return
        leaves = [p for pair in self._factors for p in pair if p.requires_grad]
        leaves += [] if view.form is None else list(view.form.parameters().values())
        for leaf, grad in zip(leaves, torch.autograd.grad(term, leaves, allow_unused=True), strict=True):
            if grad is not None:
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad

    def before_step(self, lr_factor: float) -> None:
        """Call when gradients are final. Withholds the gradients of adapters that must not move (None, not zero)."""
        if self.selection is not None:
            self.finite.see(self.step + 1)
            return
        if self.gates is not None and self.gates.omega.grad is not None:
            mean_over_processes(self.gates.omega.grad)
        if self.watch is not None:
            mean_over_processes(self.watch.products)
        self.finite.see(self.step + 1, *self._outside())
        self._add_penalty(self._view(lr_factor))
        if self.policy.setup.compares:
            self._before = tuple((A.detach().clone(), B.detach().clone()) for A, B in self._factors)
        self._withheld = [(factor, factor.grad) for index in self.policy.held for factor in self._factors[index]]
        for factor, _ in self._withheld:
            factor.grad = None

    def _outside(self) -> list[Tensor]:
        """Gradients, and what the method reads like one, of what is no parameter of the model."""
        forms = [] if self.formed is None else self.formed.form.parameters().values()
        gates = None if self.gates is None else self.gates.omega.grad
        products = None if self.watch is None else self.watch.products
        return [t for t in (gates, products, *(p.grad for p in forms)) if t is not None]

    def after_step(self, lr_factor: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call when the optimizer has stepped and gradients are still there.

        Raises:
            AdapterError: this is the first step of the survivors, and one of them has no gradient.
        """
        self._check_gradients()
        if self.selection is None:
            fresh = self._observe(lr_factor)
            if self.watch is not None:
                self.watch.take()
                if not self.policy.watches:
                    self._end_watch()
            if self.gates is not None:
                self.gates.omega.grad = None
            if optimizer is not None:
                for changed in fresh:
                    self._forget(optimizer, changed)
        self.step += 1

    def _observe(self, lr_factor: float) -> Sequence[Fresh]:
        """Let the policy see the step, with the gradients that were withheld from it."""
        for factor, grad in self._withheld:
            factor.grad = grad
        fresh = self.policy.observe(self._view(lr_factor))
        for factor, _ in self._withheld:
            factor.grad = None
        self._before, self._withheld = (), []
        return fresh

    def _forget(self, optimizer: torch.optim.Optimizer, fresh: Fresh) -> None:
        """Let the optimizer start anew on what the policy has just changed."""
        A, B = self._factors[fresh.index]
        if not fresh.gates_only:
            forget(optimizer, A, 0, fresh.ranks)
            forget(optimizer, B, 1, fresh.ranks)
        form = None if self.formed is None else self.formed.form
        if isinstance(form, RankGates) and form.trainable and fresh.ranks:
            first = form.bounds[fresh.index]
            forget(optimizer, form.values, 0, [first + rank for rank in fresh.ranks])

    def omegas(self) -> list[float]:
        """The gates now (1 where the method has none)."""
        return [1.0] * len(self.adapters) if self.gates is None else self.gates.omega.detach().tolist()

    def operate(self, optimizer: torch.optim.Optimizer | None) -> Selection:
        """The seam: decide, disconnect, fold the gates, grow, carry the optimizer over, let backward end early.

        Args:
            optimizer: the torch optimizer that holds the adapters, changed in place; None where none exists yet.

        Returns:
            The selection, with the ranks that live on.
        """
        self.finite.check()
        omegas = self.omegas()
        check_numbers("gates", omegas)
        decision = self.policy.decide(omegas)
        selection = decision.selection
        check_numbers("scores", [choice.score for choice in selection.choices])
        check_learned(selection, gates=self.policy.setup.gates == "learn")
        self._end_watch()
        if self.formed is not None:
            form = self.formed.form
            live = form.live() if decision.live is None and isinstance(form, RankGates) else decision.live
            folded = self.formed.fold(live, anew=decision.anew)
            self.formed = None
            remap(optimizer, folded)
            # Layers that shared a factor have one each now, and those of a frozen form train from here on.
            adopt(optimizer, [p for pair in parameters(self.model, self.name).values() for p in pair], self.model)
        kept = set(selection.names)
        remap(optimizer, disconnect(self.model, [a.name for a in self.adapters if a.name not in kept], self.name))
        if (growth := decision.growth) is not None:
            grown = grow_adapters(
                self.model, growth.ranks, self.name, mode=growth.mode, generator=growth.generator, **growth.options
            )
            remap(optimizer, grown)
        remap(optimizer, tie(self.model, decision.shared, self.name))
        if decision.restart is not None:
            remap(optimizer, restart(self.model, decision.restart, self.name))
        self.selection = selection.with_ranks(adapters(self.model, self.name))
        trains = {p for pair in parameters(self.model, self.name).values() for p in pair if p.requires_grad}
        after = 0 if self.policy.seam is None else sum(p.numel() for p in trains)  # what is folded at the end is over
        before = 0 if self.policy.seam == 0 else decision.peak or self.counts["trainable"]
        self.counts["peak"] = max(before, after)
        self.settle()
        self._factors = tuple(parameters(self.model, self.name).values())
        for pair in self._factors:
            for factor in pair:
                factor.grad = None  # of the step before, so that it is not taken for one of the next
        self.ride()
        log.info("kept %d of %d adapters: %s", selection.k, selection.n, selection.why)
        if growth is not None:
            old, new = _range(a.rank for a in self.adapters if a.name in kept), _range(growth.ranks.values())
            words = "their rank goes from %s to %s: %s parameters of adapters learn from here on, %s did until now"
            log.info(words, old, new, f"{after:,}", f"{self.counts['trainable']:,}")
        return self.selection

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed warm-up needs beside the trainer's checkpoint."""
        state = {f"policy.{key}": value for key, value in self.policy.state().items()}
        if self.formed is not None:
            state |= {f"form.{key}": value for key, value in self.formed.raw_state().items()}
        return state | {f"start.{key}": value for key, value in start_state(self.model, self.name).items()}

    def load_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Put :meth:`state` back, after the trainer has loaded its own checkpoint."""
        self.policy.load_state({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
        if self.formed is not None:
            self.formed.load_raw_state({k.removeprefix("form."): v for k, v in state.items() if k.startswith("form.")})
        start = {k.removeprefix("start."): v for k, v in state.items() if k.startswith("start.")}
        load_start_state(self.model, self.name, start)
        self.step = step


def _range(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    low, high = found[0], found[-1]
    return str(low) if low == high else f"{low}..{high}"

"""What becomes of the optimizer when parameters are dropped, rescaled or grown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightlora.errors import CheckpointError, ConfigError
from weightlora.graft.start import stock_name

_NAMES = "param_names"  # where torch keeps the names of parameters that an optimizer was given with names
# Adam's and AMSGrad's, RMSprop's, Adagrad's, SGD's.
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2, "momentum_buffer": 1}


class Change(ABC):
    """What happened to one parameter; it carries the optimizer along."""

    @abstractmethod
    def target(self, old: nn.Parameter) -> nn.Parameter | None:
        """What trains in the parameter's place from here on; None: nothing."""

    def moment(self, value: Tensor, order: int) -> Tensor | None:
        """A first or second moment (`order` 1 or 2) after the change; None: it is forgotten."""
        return None

    def follow(self, optimizer: torch.optim.Optimizer, old: nn.Parameter) -> nn.Parameter | None:
        """Carry the optimizer's state over to the :meth:`target`, whole or not at all."""
        state, target = optimizer.state.pop(old, None), self.target(old)
        carried = {key: self._entry(key, value, old) for key, value in (state or {}).items()}
        if target is not None and carried and all(value is not None for value in carried.values()):
            optimizer.state[target] = carried
        return target

    def _entry(self, key: str, value: object, old: nn.Parameter) -> object:
        """One entry of the state after the change, or None where there is no rule for it."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        order = _MOMENTS.get(key)
        return None if order is None or value.shape != old.shape else self.moment(value, order)


@dataclass(frozen=True)
class Drop(Change):
    """The parameter left the model."""

    def target(self, old: nn.Parameter) -> None:
        return None


@dataclass(frozen=True)
class Renew(Change):
    """`new` (perhaps the same parameter) took its place and starts with no history."""

    new: nn.Parameter

    def target(self, old: nn.Parameter) -> nn.Parameter:
        return self.new


@dataclass(frozen=True)
class Scale(Change):
    """The parameter was multiplied by ``1 / factor`` in place, so its gradients are ``factor`` times what they were."""

    factor: float

    def target(self, old: nn.Parameter) -> nn.Parameter:
        return old

    def moment(self, value: Tensor, order: int) -> Tensor:
        return value * self.factor**order


@dataclass(frozen=True)
class Cut(Change):
    """`new` holds the entries `keep` along `dim`; their gradients are ``factors`` times what they were."""

    new: nn.Parameter
    dim: int
    keep: Tensor
    factors: Tensor | None = None

    def target(self, old: nn.Parameter) -> nn.Parameter:
        return self.new

    def moment(self, value: Tensor, order: int) -> Tensor:
        kept = value.index_select(self.dim, self.keep)
        shape = [-1 if dim == self.dim else 1 for dim in range(value.dim())]
        return kept if self.factors is None else kept * self.factors.to(kept).pow(order).view(shape)


@dataclass(frozen=True)
class Grow(Change):
    """`new` took the parameter's place, longer along `dim`; its old part was mixed by the QR factor ``mix``."""

    new: nn.Parameter
    dim: int
    mix: Tensor | None

    def target(self, old: nn.Parameter) -> nn.Parameter:
        return self.new

    def moment(self, value: Tensor, order: int) -> Tensor:
        moment = value if self.mix is None else self._mixed(value, self.mix.to(value), order)
        extra = self.new.shape[self.dim] - value.shape[self.dim]
        fresh = torch.zeros_like(moment.narrow(self.dim, 0, 1))
        prior = moment.mean(self.dim, keepdim=True) if order == 2 else fresh
        return torch.cat([moment, prior.repeat_interleave(extra, self.dim)], self.dim)

    def _mixed(self, moment: Tensor, R: Tensor, order: int) -> Tensor:
        """After QR: with ``A = R^T Q^T`` and ``B' = B R^T``, ``dL/dQ^T = R dL/dA`` and ``dL/dB' = dL/dB R^-1``."""
        if self.dim == 0:
            return (R**order) @ moment
        inverse: Tensor = torch.linalg.pinv(R.to(torch.promote_types(R.dtype, torch.float32))).to(moment)
        return moment @ inverse**order


def remap(optimizer: torch.optim.Optimizer | None, changes: Mapping[nn.Parameter, Change]) -> None:
    """Carry an optimizer over a surgery, in place: groups keep their order and settings, survivors keep their state.

    A group whose parameters are all gone stays, empty: schedulers count groups. Names go with their parameters.
    Where there is no optimizer yet, nothing has to follow.

    - dropped: out of its group, its state freed;
    - rescaled, gradients times ``c``: first moments times ``c``, second times ``c^2`` (the chain rule), so Adam's next
      step is as long as it would have been, in units of the rescaled parameter;
    - cut: what is left keeps its moments, rescaled by the same rule where a gate was folded into it;
    - renewed: no state;
    - grown: old rows keep their moments (through QR: first moments by the chain rule, second as for independent
      entries); new rows start with first moment 0 and, as second moment, the mean of the old rows'. Zeros there would
      meet an old step counter and make a first step of ``(1 - b1) / sqrt(1 - b2)``, about 3.2 learning rates, rising
      to more than 6; a prior of the old size makes it about 0.1, rising to 1.

    State of other names or shapes (factored, quantised) cannot be carried and starts afresh for the grown parameter.

    Source: methods notes, optimizer-state rules; the paper is silent.
    """
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        followed = [p if p not in changes else changes[p].follow(optimizer, p) for p in group["params"]]
        if _NAMES in group:
            group[_NAMES] = [n for n, p in zip(group[_NAMES], followed, strict=True) if p is not None]
        group["params"] = [parameter for parameter in followed if parameter is not None]


def adopt(optimizer: torch.optim.Optimizer | None, parameters: Sequence[nn.Parameter], model: nn.Module) -> None:
    """Let the optimizer's first group train `parameters` of the model too, unless it does so already."""
    if optimizer is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    first, more = optimizer.param_groups[0], [p for p in parameters if id(p) not in known]
    first["params"].extend(more)
    if _NAMES in first:
        first[_NAMES].extend(names[id(p)] for p in more)


def check_groups(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that keeps more beside each parameter than surgery knows how to carry over.

    LoRA-FA's keeps names and scales of A and B there, and its state by those names.

    Raises:
        ConfigError: a group holds a list, as long as its parameters, that is neither a setting nor their names.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key in ("params", _NAMES) or key in optimizer.defaults or not isinstance(value, list):
                continue
            if len(value) == len(group["params"]):
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps a list {key!r} beside its parameters, and adapters that are cut"
                    " or grown would leave it behind; use an optimizer without one (torch's, or the trainer's optim=)"
                )


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The parameters of each group by their names in the model; "" for those of something else."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def arrange(
    optimizer: torch.optim.Optimizer,
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    model: nn.Module,
) -> None:
    """Give a new optimizer's groups the parameters of a checkpoint's, in their order, so that its state can be loaded.

    Args:
        optimizer: made over the model as a run begins. What it knows of single parameters is let go.
        before: its :func:`group_names`, taken before the model got the checkpoint's structure.
        after: those of the checkpoint.
        model: with the checkpoint's structure.

    Raises:
        CheckpointError: its groups are not the run's, so that rates and states would go to other parameters.
    """
    live = dict(model.named_parameters())
    home = {stock_name(name): index for index, group in enumerate(before) for name in group if name}
    fits = len(before) == len(after) and all(
        [name for name in new if not name] == [name for name in old if not name]
        for old, new in zip(before, after, strict=True)
    )
    # What surgery let it train besides is in the first group.
    moved = [
        n
        for index, group in enumerate(after)
        for n in group
        if n and (n not in live or home.get(stock_name(n), 0) != index)
    ]
    if not fits or moved:
        detail = f"{moved[0]} is not in the same group" if fits else f"{len(before)} groups here, {len(after)} there"
        raise CheckpointError(
            f"the optimizer's groups are not those of the checkpoint: {detail}; resume with an optimizer that is made"
            " as that of the run was"
        )
    optimizer.state.clear()
    for group, old, new in zip(optimizer.param_groups, before, after, strict=True):
        others = iter([p for p, name in zip(group["params"], old, strict=True) if not name])
        group["params"] = [live[name] if name else next(others) for name in new]
        if _NAMES in group:
            group[_NAMES] = list(new)


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, ranks: Sequence[int] | None) -> None:
    """Let some entries of a parameter along `dim` start anew: first moments 0, second those of the average other.

    With zeros there and an old step counter, Adam's first step would be 3.2 learning rates; see :func:`remap`.
    ``ranks=None``: the whole parameter, its step counter too.
    """
    if ranks is None:
        optimizer.state.pop(parameter, None)
        return
    state = optimizer.state.get(parameter)
    if not state or not ranks:
        return
    rows = torch.tensor(list(ranks), device=parameter.device)
    rest = torch.ones(parameter.shape[dim], dtype=torch.bool, device=parameter.device)
    rest[rows] = False
    for key, value in state.items():
        order = _MOMENTS.get(key)
        if order is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        used = rest & (value.movedim(dim, 0).flatten(1).abs().sum(1) > 0) if value.dim() > 1 else rest & (value != 0)
        others = value.index_select(dim, torch.nonzero(used).flatten())
        prior = others.mean(dim, keepdim=True) if order == 2 and others.numel() else 0.0
        value.index_fill_(dim, rows, 0.0)
        value.index_add_(dim, rows, torch.zeros_like(value.index_select(dim, rows)) + prior)

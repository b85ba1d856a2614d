"""What becomes of the optimizer when parameters are dropped, rescaled or grown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Adam's and AMSGrad's, RMSprop's, Adagrad's, SGD's.
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2, "momentum_buffer": 1}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happened to one parameter: dropped, rescaled in place (``factor`` multiplies its gradient), or replaced."""

    kind: Literal["drop", "scale", "grow"]
    factor: float = 1.0
    new: nn.Parameter | None = None
    dim: int = 0
    mix: Tensor | None = None

    @classmethod
    def drop(cls) -> Change:
        """The parameter left the model."""
        return cls(kind="drop")

    @classmethod
    def scale(cls, factor: float) -> Change:
        """The parameter was multiplied by ``1 / factor``, so its gradients are ``factor`` times what they were."""
        return cls(kind="scale", factor=factor)

    @classmethod
    def grow(cls, new: nn.Parameter, *, dim: int, mix: Tensor | None) -> Change:
        """`new` took the parameter's place, longer along `dim`; its old part was mixed by the QR factor ``mix``."""
        return cls(kind="grow", new=new, dim=dim, mix=mix)


def remap(optimizer: torch.optim.Optimizer, changes: Mapping[nn.Parameter, Change]) -> None:
    """Carry an optimizer over a surgery, in place: groups keep their order and settings, survivors keep their state.

    - dropped: out of its group, its state freed;
    - rescaled, gradients times ``c``: first moments times ``c``, second times ``c^2`` (the chain rule), so Adam's next
      step is as long as it would have been, in units of the rescaled parameter;
    - grown: old rows keep their moments (through QR: first moments by the chain rule, second as for independent
      entries); new rows start with first moment 0 and, as second moment, the mean of the old rows'. Zeros there would
      meet an old step counter and make a first step of ``(1 - b1) / sqrt(1 - b2)``, about 3.2 learning rates, rising
      to more than 6; a prior of the old size makes it about 0.1, rising to 1.

    State of other names or shapes (factored, quantised) cannot be carried and starts afresh for the grown parameter.

    Source: methods notes, optimizer-state rules; the paper is silent.
    """
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            change = changes.get(parameter)
            if change is None:
                kept.append(parameter)
                continue
            state = optimizer.state.pop(parameter, None)
            if change.kind == "drop":
                continue
            target = parameter if change.new is None else change.new
            if state:
                carried = {key: _carry(key, value, parameter, change) for key, value in state.items()}
                if all(value is not None for value in carried.values()):
                    optimizer.state[target] = carried
            kept.append(target)
        group["params"] = kept


def _carry(key: str, value: Any, old: nn.Parameter, change: Change) -> Any:
    """One entry of a parameter's state after the change, or None where there is no rule for it."""
    order = _MOMENTS.get(key)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if order is None or value.shape != old.shape:
        return None
    if change.kind == "scale":
        return value * change.factor**order
    assert change.new is not None
    moment = value if change.mix is None else _mix(value, change, order)
    extra = change.new.shape[change.dim] - old.shape[change.dim]
    prior = moment.mean(change.dim, keepdim=True) if order == 2 else torch.zeros_like(moment.narrow(change.dim, 0, 1))
    return torch.cat([moment, prior.repeat_interleave(extra, change.dim)], change.dim)


def _mix(moment: Tensor, change: Change, order: int) -> Tensor:
    """Moments after QR: with ``A = R^T Q^T`` and ``B' = B R^T``, ``dL/dQ^T = R dL/dA`` and ``dL/dB' = dL/dB R^-1``."""
    assert change.mix is not None
    R = change.mix.to(moment)
    if change.dim == 0:
        return (R**order) @ moment
    inverse: Tensor = torch.linalg.pinv(R.to(torch.promote_types(R.dtype, torch.float32))).to(moment)
    mixed: Tensor = moment @ inverse**order
    return mixed

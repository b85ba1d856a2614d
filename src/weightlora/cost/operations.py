"""Operations of a training step with any set of adapters, from one pass of the base alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.flop_counter import FlopCounterMode

from weightlora.core.placement import PlacementCosts
from weightlora.cost.placements import operation_costs, reserved
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import adapter_name, adapters, lora_layers, switched_off


def operations(model: nn.Module, loss: Callable[[], Tensor], *, grows: bool = False) -> PlacementCosts:
    """Count forward and backward of the base, and note when gradients reach each layer.

    Args:
        model: with every adapter live; its gradients are gone afterwards.
        loss: the forward pass of one micro-batch.
        grows: survivors take over the parameters of all n.

    Raises:
        ScheduleError: gradients do not reach every adapter, or some are on experts.
    """
    name = adapter_name(model)
    found = adapters(model, name)
    if bare := next((a.name for a in found if a.experts is not None), None):
        raise ScheduleError(
            f"operations cannot be counted: PEFT adds the adapter of {bare} to the whole weight; use memory, or k"
        )
    layers = [layer for _, layer in lora_layers(model, name)]
    counter = FlopCounterMode(display=False)
    arrivals, tokens = [0] * len(layers), [0] * len(layers)

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def arrived(_grad: Tensor) -> None:
            arrivals[index] = counter.get_total_flops()

        def see(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tokens[index] += inputs[0].numel() // inputs[0].shape[-1]
            if output.requires_grad:
                output.register_hook(arrived)  # type: ignore[no-untyped-call]

        return see

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    handles += [table.register_forward_hook(lambda _m, _i, out: out.requires_grad_()) for table in tables]
    try:
        with switched_off(model, name), counter:
            backward(loss())
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    if 0 in arrivals:
        raise ScheduleError("operations cannot be counted: no gradient reaches every adapter of this model; use memory")
    costs = operation_costs(found, arrivals, tokens)
    return reserved(costs, [a.rank * (a.d_in + a.d_out) for a in found]) if grows else costs

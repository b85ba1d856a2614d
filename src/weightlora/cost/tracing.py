"""One forward pass over weights without data, and what its graph says about every set of live adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora.cost.activations import ActivationTrace, Storage
from weightlora.cost.saved import Held, Saved
from weightlora.cost.standins import (
    ComposedWeights,
    CudaKernels,
    GroupedProducts,
    KnownMasks,
    identity,
    stand_ins,
    standing_in,
    uncheckpointed,
)
from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapter_name, adapters, bare_parameter, base_of, lora_layers
from weightlora.graft.fast import observed_path
from weightlora.graft.quantised import holds_more_than_data

if TYPE_CHECKING:
    from torch.autograd.graph import Node
    from torch.utils.hooks import RemovableHandle

# What a node of the graph saves only for the gradients of some of its inputs: {node: {saved: inputs}}. Of any other
# node everything counts as saved as soon as one input needs a gradient, which can only overestimate.
_ONLY_FOR: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "MulBackward0": {"_saved_self": (1,), "_saved_other": (0,)},
    "DivBackward0": {"_saved_self": (1,)},
    "MmBackward0": {"_saved_self": (1,), "_saved_mat2": (0,)},
    "MvBackward0": {"_saved_self": (1,), "_saved_vec": (0,)},
    "BmmBackward0": {"_saved_self": (1,), "_saved_mat2": (0,)},
    "AddmmBackward0": {"_saved_mat1": (2,), "_saved_mat2": (1,)},
    "BaddbmmBackward0": {"_saved_batch1": (2,), "_saved_batch2": (1,)},
    "GroupedMmBackward0": {"_saved_self": (1,), "_saved_mat2": (0,)},
    "AddcmulBackward0": {"_saved_tensor1": (2,), "_saved_tensor2": (1,)},
}
_SEED_BYTES = 8


def trace(model: nn.Module, loss: Callable[[], Tensor], *, stock: bool = False, cuda: bool = False) -> ActivationTrace:
    """Run one forward pass without computing or allocating anything, and note what autograd would keep.

    Weights are stood in for by tensors without data (also where the model is on the meta device), so a model of any
    size is traced anywhere, no random number is drawn, and the device's memory is not touched. What is traced is the
    model with all adapters live; the recorded graph tells what any part of them would keep.

    Args:
        model: with LoRA adapters, ungated; given back as it was.
        loss: runs the forward pass on a real batch and returns the loss.
        stock: adapters compute by PEFT's own forward, not by our path.
        cuda: dropout and attention as CUDA would run them, where the weights are not on such a device anyway.

    Raises:
        AdapterError: the model has no adapters, or its forward needs the values of its weights (quantised kernels).

    >>> from peft import LoraConfig, get_peft_model
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    >>> t = trace(model, lambda: model(torch.ones(3, 4)).sum())
    >>> t.kept([0, 1]), t.kept([1])   # x and h of one adapter: 3 x 4 and 3 x 2 numbers of 4 bytes
    (144, 72)
    """
    name = adapter_name(model)
    odd = holds_more_than_data(model)
    if odd is not None:
        raise AdapterError(
            f"what this model keeps cannot be traced without its weights: {odd} is quantised, and more than its data"
        )
    recorder = _Recorder(model, name)
    parameters, buffers = stand_ins(model)
    recorder.leaves(parameters)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(recorder.let_go)
            if not stock:
                stack.enter_context(observed_path(model, name, recorder.note_ranked, recorder.note_seed))
            stack.enter_context(uncheckpointed(model))
            stack.enter_context(recorder.hooks())
            stack.enter_context(recorder.masks)
            stack.enter_context(recorder.weights)
            stack.enter_context(GroupedProducts())  # type: ignore[no-untyped-call]
            if cuda:
                stack.enter_context(CudaKernels())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(standing_in(model, {**parameters, **buffers}))
            return recorder.finish(loss())
    except (NotImplementedError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"what this model keeps cannot be traced without its weights: {line}") from None


class _Event(Saved):
    """One tensor that autograd saved: on whose behalf, and in which checkpointed unit."""

    __slots__ = ("owner", "storage", "unit")

    def __init__(self, tensor: Tensor, storage: int, owner: int, unit: int) -> None:
        super().__init__(tensor)
        self.storage, self.owner, self.unit = storage, owner, unit


class _Recorder:
    """Notes what is saved, where, and on whose behalf; then reads from the graph what each piece is needed for."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.found = adapters(model, name)
        self.layers = [layer for _, layer in lora_layers(model, name)]
        root = base_of(model)
        self.units = [(path, m) for path, m in root.named_modules() if isinstance(m, GradientCheckpointingLayer)]
        self.index: dict[int, int] = {}  # of storages, by identity
        self.sizes: list[int] = []
        self.modules: list[str] = []
        self.ranked: set[int] = set()
        self.alive: list[object] = []  # so that no address is used twice
        self.parameters: set[int] = set()
        self.bits: dict[int, int] = {}
        self.seeds: list[int] = []
        self.stack: list[str] = []
        self.masks, self.weights = KnownMasks(), ComposedWeights()
        self.owner, self.unit = -1, -1
        self.unit_inputs: dict[int, list[int]] = {}
        self.opened: list[_Event] = []  # what the graph has just unpacked
        self.held: Held[_Event] = Held()

    def leaves(self, parameters: Mapping[str, Tensor]) -> None:
        """Which bit each trained parameter stands for."""
        n, real = len(self.found), dict(self.model.named_parameters(remove_duplicate=False))
        owners: dict[int, int] = {}
        bare: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            if self.found[index].experts is not None:
                bare[id(bare_parameter(layer))] = index
            for holder in (layer.lora_A[self.name], layer.lora_B[self.name]):
                owners[id(holder.weight)] = owners.get(id(holder.weight), 0) | 1 << index
        for key, stand_in in parameters.items():
            self.parameters.add(identity(stand_in))
            if id(real[key]) in bare:
                self.weights.parameters[identity(stand_in)] = bare[id(real[key])]
            self.bits[id(stand_in)] = owners.get(id(real[key]), 1 << n)
        self.parameters |= {identity(b) for b in self.model.buffers()}
        self.alive += [*parameters.values(), *self.model.buffers()]

    def note_ranked(self, h: Tensor) -> None:
        self.ranked.add(self._storage(h))

    def note_seed(self, index: int) -> None:
        self.seeds.append(index)

    def _storage(self, tensor: Tensor) -> int:
        tensor = self.masks.stands_for.get(identity(tensor), tensor)
        key = identity(tensor)
        if key not in self.index:
            self.index[key] = len(self.sizes)
            self.sizes.append(0 if key in self.parameters else tensor.untyped_storage().nbytes())
            self.modules.append(self.stack[-1] if self.stack else "")
            self.alive.append(tensor.untyped_storage())
        return self.index[key]

    def _pack(self, tensor: Tensor) -> _Event:
        owner = self.weights.composed.get(identity(tensor), self.owner)
        return self.held.add(_Event(tensor, self._storage(tensor), owner, self.unit))

    def let_go(self) -> None:
        """Free the graph. Nobody can go back through tensors without data, so that none of them is kept."""
        self.opened = []
        nothing = torch.empty(0)
        self.held.let_go(lambda _: nothing)

    def _unpack(self, event: _Event) -> Tensor:
        self.opened.append(event)
        return event.tensor

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for path, module in base_of(self.model).named_modules():
                handles += _around(module, partial(self.stack.append, path), self.stack.pop)
            for index, layer in enumerate(self.layers):
                # While a layer's base runs, nobody owns what is saved but the base itself.
                handles += _around(layer, partial(self._own, index), partial(self._own, -1))
                handles += _around(layer.get_base_layer(), partial(self._own, -1), partial(self._own, index))
                # PEFT's own forward goes through it.
                handles.append(layer.lora_A[self.name].register_forward_hook(lambda _m, _i, h: self.note_ranked(h)))
            for index, (_, module) in enumerate(self.units):
                handles.append(module.register_forward_pre_hook(partial(self._enter, index)))
                handles.append(module.register_forward_hook(self._leave))
            for table in _embeddings(self.model):
                handles.append(table.register_forward_hook(self._require_grad))
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _own(self, owner: int) -> None:
        self.owner = owner

    def _enter(self, index: int, _module: nn.Module, args: tuple[object, ...]) -> None:
        self.unit = index
        # What a checkpoint saves are the positional arguments.
        self.unit_inputs[index] = [self._storage(arg) for arg in args if isinstance(arg, Tensor)]

    def _leave(self, *_: object) -> None:
        self.unit = -1

    def _require_grad(self, _module: nn.Module, _args: object, out: Tensor) -> None:
        if out.grad_fn is None:
            out.requires_grad_()
            self.bits[id(out)] = 1 << (len(self.found) + 1)
            self.alive.append(out)

    def finish(self, value: Tensor) -> ActivationTrace:
        uses: list[set[tuple[int, int, int]]] = [set() for _ in self.sizes]
        for event, reach in self._saved(value):
            uses[event.storage].add((event.owner, reach, event.unit))
        storages = [
            Storage(size=size, ranked=index in self.ranked, module=module, uses=tuple(sorted(use)))
            for index, (size, module, use) in enumerate(zip(self.sizes, self.modules, uses, strict=True))
        ]
        layer_of = {index: path for index, (path, _) in enumerate(lora_layers(self.model, self.name))}
        unit_of = {
            index: next((u for u, (path, _) in enumerate(self.units) if layer_of[index].startswith(f"{path}.")), -1)
            for index in layer_of
        }
        storages += [
            Storage(size=_SEED_BYTES, ranked=False, module=layer_of[i], uses=((i, 1 << i, unit_of[i]),))
            for i in self.seeds
        ]
        return ActivationTrace(
            adapters=self.found,
            storages=tuple(storages),
            units=tuple(path for path, _ in self.units),
            unit_inputs=tuple(tuple(self.unit_inputs.get(i, ())) for i in range(len(self.units))),
        )

    def _saved(self, value: Tensor) -> Iterator[tuple[_Event, int]]:
        """Every saved tensor that backward would read, with the bit set of leaves it is needed for."""
        if value.grad_fn is None:
            return
        reach: dict[Node, int] = {}
        names: dict[type, list[str]] = {}
        for node in _bottom_up(value.grad_fn):
            edges = [0 if below is None else reach[below] for below, _ in node.next_functions]
            variable = getattr(node, "variable", None)
            reach[node] = self.bits.get(id(variable), 0) if variable is not None else _union(edges)
            rules = _ONLY_FOR.get(node.name(), {})
            if isinstance(node, BackwardCFunction):  # written in Python
                yield from ((event, reach[node]) for event in self._opened_by(node, "saved_tensors"))
                continue
            if type(node) not in names:
                names[type(node)] = [key for key in dir(node) if key.startswith("_saved_")]
            for key in names[type(node)]:
                needed = _union([edges[i] for i in rules[key]]) if key in rules else reach[node]
                yield from ((event, needed) for event in self._opened_by(node, key))

    def _opened_by(self, node: Node, key: str) -> list[_Event]:
        """What reading an attribute of a node unpacks."""
        self.opened = []
        getattr(node, key)
        return self.opened


def _around(module: nn.Module, before: Callable[[], object], after: Callable[[], object]) -> list[RemovableHandle]:
    """Hooks that look at nothing. They hand back None, so that they change nothing either."""
    return [
        module.register_forward_pre_hook(lambda *_: (before(), None)[1]),
        module.register_forward_hook(lambda *_: (after(), None)[1]),
    ]


def _union(masks: Iterable[int]) -> int:
    return reduce(or_, masks, 0)


def _bottom_up(root: Node) -> Iterator[Node]:
    """Every node of the graph, after all that it depends on."""
    done: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None]


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The tables whose outputs ``enable_input_require_grads`` makes require a gradient."""
    found: dict[int, nn.Module] = {}
    for module in base_of(model).modules():
        if isinstance(module, PreTrainedModel):
            with contextlib.suppress(NotImplementedError):
                table = module.get_input_embeddings()
                if table is not None:
                    found[id(table)] = table
    return list(found.values())

"""Adapters whose computing factors are made from the trained ones: gates of adapters or ranks, blocks, nests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from weightlora.graft.adapters import adapters, factors, lora_layers, refuse_tied
from weightlora.graft.optimizer import Change, Cut, Drop, Renew
from weightlora.graft.surgery import fold, set_factors, sync_config
from weightlora.graft.variant import FormVariant
from weightlora.ops import Engine, engine

if TYPE_CHECKING:
    from weightlora.graft.adapters import AdapterLayer

PREFIX = "form_"  # of extra parameters on the model; PEFT saves only names with "lora_" in them, so these stay out


class Form:
    """``(A, B) -> (A', B')``: how the factors that compute come about. Override :meth:`effective`; the rest if needed.

    A form belongs to all n adapters of a run. Whatever it makes must be plain LoRA again, ``dW = s B' A'``, so that
    every engine, every checkpoint and every export works with it. ``frozen``: A and B do not train under it.
    """

    frozen: ClassVar[bool] = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains beside A and B, by name. Registered on the model while the form is attached."""
        return {}

    def constants(self) -> dict[str, Tensor]:
        """Tensors that do not train and that a resumed run needs; written into in place by a resume."""
        return {}

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors that compute, ``A' (r', d_in)`` and ``B' (d_out, r')``, differentiable in all that trains."""
        return A, B

    def gate(self, index: int) -> Tensor | None:
        """A number ``()`` by which the product counts; None: 1."""
        return None

    def rank(self, index: int, rank: int) -> int:
        """r' of an adapter whose own factors have `rank`."""
        return rank

    def folded(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(A', B', c)`` to go on with as plain LoRA: the same product; c: what each rank of B was multiplied by, or
        None where moments do not follow."""
        new_A, new_B = self.effective(index, A, B)
        return new_A, new_B, None


class Omega(Form):
    """``dW = s omega_i B A``: one number per adapter, as one vector.

    ``omega: (n,)`` is a leaf tensor. It is no parameter of any module: nothing shards, flattens, saves or clips it by
    accident, its gradient is one vector, and a decision costs one top-K.
    """

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega

    def constants(self) -> dict[str, Tensor]:
        return {"omega": self.omega}

    def gate(self, index: int) -> Tensor:
        return self.omega[index]


class RankGates(Form):
    """One number per rank: ``dW = s B diag(c) A``. E of AdaLoRA, c of Dynamic LoRA, the 0/1 gates of ALoRA.

    All gates of a run are one vector, so a decision over all ranks is one sort, and the optimizer sees one parameter.

    Args:
        ranks: r of each adapter, in module order.
        value: of every gate at the start.
        trainable: whether they are learnt; otherwise they are constants that a policy sets.
        device: where they live.

    ``values: (sum r,)`` float32. ``open: (sum r,)`` bool: where it is False a gate acts but does not learn.

    >>> gates = RankGates([2, 1], value=1.0, trainable=False, device=torch.device("cpu"))
    >>> gates.set(torch.tensor([1.0, 0.0, 3.0]))
    >>> gates.of(0), gates.of(1), gates.live()
    (tensor([1., 0.]), tensor([3.]), [[0], [0]])
    """

    def __init__(self, ranks: Sequence[int], *, value: float, trainable: bool, device: torch.device) -> None:
        self.bounds = [0]
        for rank in ranks:
            self.bounds.append(self.bounds[-1] + rank)
        flat = torch.full((self.bounds[-1],), value, dtype=torch.float32, device=device)
        self.trainable = trainable
        self.values = nn.Parameter(flat, requires_grad=trainable)
        self.open = torch.ones_like(flat, dtype=torch.bool)
        self.owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(list(ranks))).to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"rank_gates": self.values} if self.trainable else {}

    def constants(self) -> dict[str, Tensor]:
        return {"open": self.open} if self.trainable else {"open": self.open, "values": self.values.data}

    def of(self, index: int) -> Tensor:
        """The gates of one adapter, ``(r,)``; differentiable where open, while ``values`` asks for a gradient."""
        part = slice(self.bounds[index], self.bounds[index + 1])
        values = self.values[part]
        return torch.where(self.open[part], values, values.detach()) if values.requires_grad else values.detach()

    def set(self, values: Tensor) -> None:
        """Overwrite all gates in place; their gradient is kept."""
        with torch.no_grad():
            self.values.copy_(values)

    def live(self) -> list[list[int]]:
        """For each adapter, the ranks whose gate is not 0."""
        flags = (self.values.detach() != 0).tolist()
        return [
            [rank for rank, flag in enumerate(flags[start:end]) if flag]
            for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)
        ]

    def effective(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(index).unsqueeze(1).to(A.dtype) * A, B

    def folded(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        c = self.of(index).detach()
        return A, B * c.to(B), c


class Formed:
    """A form on every adapter of a model, from here to :meth:`fold`.

    Meanwhile the model's ``state_dict`` shows A' and B' in place of A and B, so whoever saves the model in the middle
    of a run writes a plain LoRA adapter that computes what the live model computes. Loading such a checkpoint leaves
    A and B alone: :meth:`load_raw_state` brings them back.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> formed = Formed(model, RankGates([2], value=0.5, trainable=True, device=torch.device("cpu")))
    >>> [name for name, _ in model.named_parameters() if "gates" in name]
    ['form_rank_gates']
    >>> changes = formed.fold([[0]]); adapters(model)[0].rank
    1
    """

    def __init__(
        self, model: nn.Module, form: Form, name: str = "default", *, engine_name: Engine = "autograd"
    ) -> None:
        self.model, self.form, self.name = model, form, name
        self.adapters = adapters(model, name)
        self._layers = [layer for _, layer in lora_layers(model, name)]
        self._hooks = []
        path = engine(engine_name)
        for key, parameter in form.parameters().items():
            model.register_parameter(PREFIX + key, parameter)
        for index, layer in enumerate(self._layers):
            layer.lora_variant[name] = FormVariant(form, index, path)
            for factor in factors(layer, name) if form.frozen else ():
                factor.requires_grad_(False)
            layer.cast_input_dtype_enabled = False  # the path casts inside, and q, k, v share x
            self._hooks.append(layer.register_state_dict_post_hook(self._show_plain(index)))  # type: ignore[no-untyped-call]
            self._hooks.append(layer.register_load_state_dict_pre_hook(self._keep_own))  # type: ignore[no-untyped-call]
        shown = [form.rank(i, a.rank) for i, a in enumerate(self.adapters)]
        if shown != [a.rank for a in self.adapters]:
            sync_config(model, name, shown)

    def _show_plain(self, index: int) -> Callable[[AdapterLayer, dict[str, Tensor], str, object], None]:
        def hook(layer: AdapterLayer, state: dict[str, Tensor], prefix: str, _meta: object) -> None:
            A, B = self.form.effective(index, *factors(layer, self.name))
            gate = self.form.gate(index)
            for key, factor in (("A", A), ("B", B if gate is None else B * gate.to(B))):
                state[f"{prefix}lora_{key}.{self.name}.weight"] = factor.detach().clone()

        return hook

    def _keep_own(self, layer: AdapterLayer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for key, factor in zip("AB", factors(layer, self.name), strict=True):
            full = f"{prefix}lora_{key}.{self.name}.weight"
            if full in state:
                state[full] = factor.detach()

    def raw_state(self) -> dict[str, Tensor]:
        """Everything that trains or was set by the form: what a resume needs and a plain checkpoint does not hold."""
        state = {f"form.{key}": value.detach().clone() for key, value in self.form.parameters().items()}
        state |= {f"constant.{key}": value.detach().clone() for key, value in self.form.constants().items()}
        for adapter, layer in zip(self.adapters, self._layers, strict=True):
            A, B = factors(layer, self.name)
            state |= {f"A.{adapter.name}": A.detach().clone(), f"B.{adapter.name}": B.detach().clone()}
        return state

    def load_raw_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`raw_state` back."""
        with torch.no_grad():
            for key, value in self.form.parameters().items():
                value.copy_(state[f"form.{key}"])
            for key, constant in self.form.constants().items():
                constant.copy_(state[f"constant.{key}"])
            for adapter, layer in zip(self.adapters, self._layers, strict=True):
                A, B = factors(layer, self.name)
                A.copy_(state[f"A.{adapter.name}"])
                B.copy_(state[f"B.{adapter.name}"])

    def fold(self, live: Sequence[Sequence[int]] | None = None, *, anew: bool = False) -> dict[nn.Parameter, Change]:
        """Take the form off: every layer is stock LoRA with the factors that the form made of its own.

        Args:
            live: for each adapter the ranks to go on with (an empty list: leave it as it is, to be disconnected);
                None: all.
            anew: the optimizer's memory of A and B is of no use any more.

        Returns:
            How the optimizer state follows.
        """
        self.detach()
        changes: dict[nn.Parameter, Change] = {p: Drop() for p in self.form.parameters().values()}
        for index, layer in enumerate(self._layers):
            A, B = factors(layer, self.name)
            ranks = (live[index] if live else ()) or range(self.form.rank(index, A.shape[0]))
            keep = torch.tensor(list(ranks), device=A.device)
            with torch.no_grad():
                new_A, new_B, c = self.form.folded(index, A, B)
                pair = new_A.index_select(0, keep).to(A.dtype), new_B.index_select(1, keep).to(B.dtype)
            new = set_factors(layer, self.name, *(t.detach().clone() for t in pair))
            for parameter in new:
                parameter.requires_grad_(True)
            if c is None or anew:
                changes |= {A: Renew(new[0]), B: Renew(new[1])}
            else:
                back = c.index_select(0, keep).reciprocal()
                changes |= {A: Cut(new[0], 0, keep), B: Cut(new[1], 1, keep, back)}
        sync_config(self.model, self.name)
        return changes

    def detach(self) -> None:
        """Take the form off without folding it: every layer is PEFT's stock layer again, on its own factors."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.lora_variant.pop(self.name, None)
            layer.cast_input_dtype_enabled = True
        for key in self.form.parameters():
            self.model._parameters.pop(PREFIX + key, None)


class Gates(Formed):
    """:class:`Omega` on every adapter of a model.

    Args:
        model: with LoRA adapters, none of which share factors.
        name: PEFT's adapter name.
        value: of every gate at the start.
        trainable: whether a backward pass leaves ``omega.grad``; whoever moves the gates steps them himself.
        engine_name: how adapters compute.
        dtype: of omega.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> gates = Gates(model); gates.omega
    tensor([1.], requires_grad=True)
    >>> gates.detach()
    """

    form: Omega

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        *,
        value: float = 1.0,
        trainable: bool = True,
        engine_name: Engine = "autograd",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        live = adapters(model, name)
        refuse_tied(live)
        device = factors(next(lora_layers(model, name))[1], name)[0].device
        omega = torch.full((len(live),), value, dtype=dtype, device=device, requires_grad=trainable)
        super().__init__(model, Omega(omega), name, engine_name=engine_name)

    @property
    def omega(self) -> Tensor:
        """The gates, ``(n,)``."""
        return self.form.omega

    def __len__(self) -> int:
        return len(self.adapters)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """The live parameters ``A (r, d_in)`` and ``B (d_out, r)`` of adapter `index`."""
        return factors(self._layers[index], self.name)

    def set(self, values: Tensor) -> None:
        """Overwrite omega in place; its gradient is kept."""
        with torch.no_grad():
            self.omega.copy_(values)

    def fold(self, live: Sequence[Sequence[int]] | None = None, *, anew: bool = False) -> dict[nn.Parameter, Change]:
        """``B <- omega B`` in place, so that A and B stay the parameters that they are; NaN where omega is none."""
        self.detach()
        omegas = dict(zip((a.name for a in self.adapters), self.omega.detach().tolist(), strict=True))
        for index, omega in enumerate(omegas.values()):
            if omega == 0.0 or not math.isfinite(omega):
                nn.init.constant_(self.factors(index)[1], omega)
        usable = {name: omega for name, omega in omegas.items() if omega != 0.0 and math.isfinite(omega)}
        return fold(self.model, usable, self.name)


def scalar_products(model: nn.Module, name: str = "default") -> Tensor:
    """``<dL/dW_i, s B_i A_i>`` of every adapter, from gradients that a backward pass has just left.

    With G = dL/dW the gradient of B is ``s G A^T``, so ``<dL/dB, B> = <G, s B A>`` and G itself is never formed. Where
    gates train it is the gate's own gradient, which exists at a gate of 0 too.

    Returns:
        ``(n,)`` float64 in module order, on the CPU; 0 where no gradient arrived.

    Source: paper, section 3.1: the scalar products of Figure 2.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> scalar_products(model)  # B is zero at the start
    tensor([0.], dtype=torch.float64)
    """
    found = []
    layers = [layer for _, layer in lora_layers(model, name)]
    for layer in layers:
        variant, B = layer.lora_variant.get(name), factors(layer, name)[1]
        if isinstance(variant, FormVariant) and isinstance(variant.form, Omega) and variant.form.omega.requires_grad:
            grad = variant.form.omega.grad
            product = torch.zeros(()) if grad is None else grad[variant.index]
        else:
            product = torch.zeros(()) if B.grad is None else (B.grad * B.detach()).sum()
        found.append(product.double().cpu())
    return torch.stack(found)

"""Structural change on a live PEFT model: disconnect, fold, grow. Shapes change here and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from weightlora.core.growth import Growth, grow
from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters, base_of, experts_of, factors, lora_layers, rank_of, wrappers
from weightlora.graft.optimizer import Change, Drop, Grow, Renew, Scale
from weightlora.graft.start import give_back

if TYPE_CHECKING:
    from weightlora.graft.adapters import Adapter
    from weightlora.graft.profiles import Pair
    from weightlora.graft.selection import Choice, Selection


def disconnect(model: nn.Module, names: Sequence[str], name: str = "default") -> dict[nn.Parameter, Change]:
    """Put the base layer back in the place of each adapter in `names`: no module, gradient, state or kernel is left.

    Where the layer holds other adapters too, only this one is taken out of it. What the adapter's initialisation took
    out of the base weight (PiSSA, OLoRA) is given back to it.

    Args:
        model: a model with LoRA adapters.
        names: full module names, as in :class:`Adapter`.
        name: PEFT's adapter name.

    Returns:
        ``{parameter: Drop}`` for :func:`weightlora.graft.optimizer.remap`.

    Raises:
        AdapterError: a name carries no such adapter, the adapter is merged, or what its initialisation took is unknown.

    Source: paper, section 3.3 ("disconnect the adapters with omega_i = 0").
    """
    layers = dict(lora_layers(model, name))
    unknown = [path for path in names if path not in layers]
    if unknown:
        raise AdapterError(
            f"no adapter {name!r} on {unknown[0]!r}; the adapters are on {', '.join(layers) or 'nothing'}"
        )
    merged = [path for path in names if name in layers[path].merged_adapters]
    if merged:
        raise AdapterError(f"the adapter on {merged[0]!r} is merged into its base; call model.unmerge_adapter() first")
    root = base_of(model)
    for path in names:
        give_back(model, path, layers[path], name)
    dropped: dict[nn.Parameter, Change] = {}
    for path in names:
        layer = layers[path]
        for factor in factors(layer, name):
            dropped[factor] = Drop()
        if set(layer.lora_A) == {name}:
            _take_out(root, path, layer)
        else:
            # Deleting an active adapter makes PEFT activate another one in its place, which would change the output.
            layer.set_adapter([other for other in layer.active_adapters if other != name])
            layer.delete_adapter(name)
    sync_config(model, name)
    return dropped


def _take_out(root: nn.Module, path: str, layer: LoraLayer) -> None:
    """Put what is under a LoRA layer in its place: the base, or the wrapper of another parameter of the same module."""
    if experts_of(layer) is not None:
        path = path.rpartition(".")[0]
        outer = next((w for w in wrappers(root.get_submodule(path)) if id(w.base_layer) == id(layer)), None)
        if outer is not None:
            outer.base_layer = layer.base_layer
            return
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, layer.base_layer)


def fold(model: nn.Module, omegas: Mapping[str, float], name: str = "default") -> dict[nn.Parameter, Change]:
    """``B <- omega B``: the gate becomes part of the plain adapter and the output does not change.

    Returns:
        How the optimizer state of each B follows: with ``B' = omega B`` gradients divide by omega, so Adam's first
        moment does too and its second by omega squared. Adam's next step on B' is then as long as one on B would have
        been, which is ``1 / |omega|`` of what it was for the product; only a learning rate of ``|omega| lr`` would
        equal the gated run.

    Raises:
        AdapterError: an omega is zero or not finite (disconnect such an adapter instead).
    """
    changes: dict[nn.Parameter, Change] = {}
    for path, layer in lora_layers(model, name):
        omega = omegas.get(path, 1.0)
        if omega == 1.0:
            continue
        if omega == 0.0 or not torch.isfinite(torch.tensor(omega)):
            raise AdapterError(
                f"omega of {path} is {omega}; only a non-zero finite gate can be folded into B; remove this"
                " adapter instead"
            )
        B = factors(layer, name)[1]
        with torch.no_grad():
            B.mul_(omega)
        changes[B] = Scale(1.0 / omega)
    return changes


def grow_adapters(
    model: nn.Module,
    ranks: Mapping[str, int],
    name: str = "default",
    *,
    mode: Growth = "gaussian",
    generator: torch.Generator,
    **options: Any,
) -> dict[nn.Parameter, Change]:
    """Raise the rank of adapters without changing what they compute: ``s B' A' == s B A``.

    PEFT's scale ``alpha / r`` is held at its value before growth (alpha grows with r), so the paper's "does not change
    the adapter's value" holds under scaling too. New parameters replace the old ones; no tensor is resized in place.

    Args:
        model: a model with LoRA adapters.
        ranks: new rank by full module name; names that are left out keep theirs.
        name: PEFT's adapter name.
        mode, generator, options: as :func:`weightlora.core.growth.grow`.

    Returns:
        How the optimizer state follows, old parameter by old parameter.

    Source: paper, section 3.4, phase 2.
    """
    changes: dict[nn.Parameter, Change] = {}
    for path, layer in lora_layers(model, name):
        A, B = factors(layer, name)
        new_rank = ranks.get(path, rank_of(layer, name))
        if new_rank == rank_of(layer, name):
            continue
        _refuse_experts(path, layer)
        grown = grow(A.detach(), B.detach(), new_rank, mode, generator=generator, **options)
        new_A, new_B = set_factors(layer, name, grown.A, grown.B)
        changes |= {A: Grow(new_A, 0, grown.mix), B: Grow(new_B, 1, grown.mix)}
    sync_config(model, name)
    return changes


def reshape(model: nn.Module, selection: Selection, name: str = "default") -> None:
    """Give a freshly built model the structure of a finished surgery: the survivors alone, their ranks, scales, ties.

    Factors of a new rank are zero afterwards; load a checkpoint into them. Used when a run is resumed after the seam.
    """
    ranks, scales = ({c.name: getattr(c, what) for c in selection.kept} for what in ("rank", "scale"))
    present = [path for path, _ in lora_layers(model, name)]
    missing = [path for path in ranks if path not in present]
    if missing:
        raise AdapterError(
            f"the checkpoint keeps an adapter on {missing[0]!r}, which this model does not have; it has {len(present)}"
            " adapters: build the model with the base and the LoraConfig that the run was started with"
        )
    disconnect(model, [path for path in present if path not in ranks], name)
    for change in resize(model, ranks, scales, name).values():
        nn.init.zeros_(change.new)
    tie(model, selection.groups, name)


def resize(
    model: nn.Module, ranks: Mapping[str, int], scales: Mapping[str, float], name: str = "default"
) -> dict[nn.Parameter, Renew]:
    """Give every adapter a rank and a scale: ranks in excess are cut off, new ones are zero in A and in B.

    Zero in both is a point that training cannot leave: whoever calls this sets initial values, or loads some.

    Returns:
        How the optimizer state follows (afresh).
    """
    changes: dict[nn.Parameter, Renew] = {}
    for path, layer in lora_layers(model, name):
        A, B = factors(layer, name)
        rank = ranks[path]
        if rank != rank_of(layer, name):
            _refuse_experts(path, layer)
            same = min(rank, A.shape[0])
            wide_A, wide_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
            wide_A[:same], wide_B[:, :same] = A.detach()[:same], B.detach()[:, :same]
            new_A, new_B = set_factors(layer, name, wide_A, wide_B)
            changes |= {A: Renew(new_A), B: Renew(new_B)}
        layer.scaling[name] = scales[path]
        layer.lora_alpha[name] = scales[path] * rank
    sync_config(model, name)
    return changes


def _refuse_experts(path: str, layer: LoraLayer) -> None:
    """Raise AdapterError where A and B stack the pairs of several matrices, which no other rank fits."""
    if experts_of(layer) is not None:
        raise AdapterError(
            f"{path} is a bare parameter (experts, a router), and the rank of its adapter cannot change; leave"
            " it out of target_parameters, or use a method that does not change ranks"
        )


def tie(model: nn.Module, groups: Sequence[Sequence[str]], name: str = "default") -> dict[nn.Parameter, Change]:
    """Let the adapters of each group share A and B: those of the group's first.

    Args:
        model: a model with LoRA adapters.
        groups: full module names; within a group all shapes, ranks and scales are equal.
        name: PEFT's adapter name.

    Returns:
        ``{parameter: Drop}`` for the factors that nobody uses any more.

    Raises:
        AdapterError: a group mixes shapes, ranks or scales.
    """
    layers = dict(lora_layers(model, name))
    dropped: dict[nn.Parameter, Change] = {}
    for first, *others in groups:
        shared = factors(layers[first], name)
        for path in others:
            own = factors(layers[path], name)
            same_scale = layers[path].scaling[name] == layers[first].scaling[name]
            if [t.shape for t in own] != [t.shape for t in shared] or not same_scale:
                raise AdapterError(f"{path} and {first} differ in shape, rank or scale, so they cannot share factors")
            for holder, old, new in zip(
                (layers[path].lora_A[name], layers[path].lora_B[name]), own, shared, strict=True
            ):
                if old is not new:
                    dropped[old] = Drop()
                    holder.weight = new
    return dropped


def restart(model: nn.Module, generator: torch.Generator, name: str = "default") -> dict[nn.Parameter, Change]:
    """Put every adapter back to where LoRA starts: ``A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))``, ``B = 0``.

    Returns:
        ``{parameter: Renew}``: the optimizer starts afresh on them, too.
    """
    changes: dict[nn.Parameter, Change] = {}
    for _, layer in lora_layers(model, name):
        A, B = factors(layer, name)
        if A in changes:
            continue  # shared with an earlier adapter
        start = torch.rand(A.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1) / A.shape[1] ** 0.5
        with torch.no_grad():
            A.copy_(start)
            B.zero_()
        changes |= {A: Renew(A), B: Renew(B)}
    return changes


def set_factors(layer: LoraLayer, name: str, A: Tensor, B: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """New parameters in the place of A and B; PEFT's scale is held and alpha follows the rank."""
    old_A, old_B = factors(layer, name)
    new_A, new_B = (nn.Parameter(t, requires_grad=old.requires_grad) for t, old in ((A, old_A), (B, old_B)))
    rank = A.shape[0]
    for holder, parameter, size in (
        (layer.lora_A[name], new_A, {"out_features": rank}),
        (layer.lora_B[name], new_B, {"in_features": rank}),
    ):
        holder.weight = parameter
        for attribute, value in size.items():
            setattr(holder, attribute, value)
    layer.r[name] = rank
    layer.lora_alpha[name] = layer.scaling[name] * rank
    return new_A, new_B


def _plain(alpha: float) -> float:
    """An int where alpha is a whole number, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def sync_config(model: nn.Module, name: str, ranks: Sequence[int] | None = None) -> None:
    """Make PEFT's config tell the truth, so that its own ``save_pretrained`` writes a loadable adapter.

    The model gets a config of its own: TRL gives its reference adapter the very same one, and users keep theirs.

    `ranks`: what the model's state dict shows of each adapter, where that differs from what trains.
    """
    live = adapters(model, name)
    if ranks is not None:
        live = tuple(replace(adapter, rank=rank) for adapter, rank in zip(live, ranks, strict=True))
    configs = getattr(model, "peft_config", {})
    config = configs[name] = copy.copy(configs[name])
    rank, alpha = common(live)
    config.target_modules = {adapter.name for adapter in live if adapter.experts is None}
    # PEFT looks parameters up in a list; None, not an empty one, is what a config without them has.
    config.target_parameters = [adapter.name for adapter in live if adapter.experts is not None] or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.r, config.lora_alpha, config.use_rslora = rank, alpha, False
    config.rank_pattern = {a.name: a.rank for a in live if a.rank != rank}
    config.alpha_pattern = {
        a.name: _plain(a.scale * a.rank) for a in live if abs(a.scale * a.rank - alpha) > 1e-9 * max(1.0, abs(alpha))
    }
    tuner = getattr(model, "base_model", None)
    if tuner is not None and hasattr(tuner, "targeted_module_names"):
        tuner.targeted_module_names = [adapter.name for adapter in live if adapter.experts is None]
        tuner.targeted_parameter_names = config.target_parameters or []


def common(live: Sequence[Adapter | Choice | Pair]) -> tuple[int, float]:
    """The most frequent (rank, alpha); the first such in module order where several are equally frequent."""
    pairs = [(a.rank, _plain(a.scale * a.rank)) for a in live]
    return max(pairs, key=pairs.count)

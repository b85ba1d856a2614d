"""Tied-LoRA: one A and one B for all layers of a kind, and two small vectors per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from weightlora.core.budget import total_params
from weightlora.errors import ConfigError
from weightlora.graft.adapters import Adapter
from weightlora.graft.architectures import Vectors
from weightlora.graft.forms import Form
from weightlora.methods.base import AdapterMethod, Shapes
from weightlora.methods.policy import Factors, Fixed, Policy, Setup


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(AdapterMethod):
    """``dW_l = s diag(v_l) B diag(u_l) A``: A and B shared by all layers of one module kind, u (r) and v (d_out) per
    layer.

    Layers share where kind (``query``, ``down_proj``), shape, rank and scale are equal. ``B = 0`` and ``u = v = 1``
    at the start. The result is plain LoRA on every layer (tl5: still shared).

    Args:
        variant: ``"tl6"`` trains A, B, u, v; ``"tl5"`` A and B alone, with ``u = v = 1``.

    Source: Renduchintala et al. 2023, "Tied-LoRA". Departs from it in sharing per module kind, where the source has
    one fused query-key-value layer, and in taking the scale from the model's ``LoraConfig`` (source: alpha = r).

    >>> TiedLoRA(variant="tl5").variant
    'tl5'
    """

    name: ClassVar[str] = "tied_lora"
    rate: ClassVar[float] = 3.0  # measured; see docs/methods.md
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"variant": "tl6"},
        "official": {"variant": "tl6"},
    }

    variant: Literal["tl6", "tl5"] = "tl6"

    def within(self, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[TiedLoRA, int]:
        names = kinds or [str(place) for place in range(len(shapes))]  # kinds unknown: as if no two layers shared
        shared = sum(sum(shape) for _, shape in dict.fromkeys(zip(names, shapes, strict=True)))
        vectors = sum(d_out for _, d_out in shapes) if self.variant == "tl6" else 0
        each = shared + (len(shapes) if self.variant == "tl6" else 0)
        if params < vectors + each:
            raise ConfigError(
                f"{params} parameters are too few for tied_lora of rank 1 on {len(shapes)} layers;"
                f" use at least {vectors + each} or fewer target modules"
            )
        return self, (params - vectors) // each

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        groups = sharers(adapters)
        why = f"every adapter lives; {len(adapters)} share {len(groups)} pairs of factors"
        vectors = self.variant == "tl6"

        def form(factors: Factors) -> Form:
            ranks, widths = [A.shape[0] for A, _ in factors], [B.shape[0] for _, B in factors]
            return Vectors(ranks, widths, factors[0][0].device)

        def count(live: Sequence[Adapter]) -> int:
            """``sum over kinds of r (d_in + d_out)``, and for tl6 ``sum over layers of r + d_out``."""
            first = [live[group[0]] for group in groups]
            shared = total_params([a.rank for a in first], [a.shape for a in first])
            return shared + (sum(a.rank + a.d_out for a in live) if vectors else 0)

        setup = Setup(ties=groups, form=form if vectors else None, count=count)
        return Fixed(adapters, self.keep_all(adapters, why), setup=setup)


def sharers(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Positions of the adapters that can share factors: same kind, shape, rank and scale."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, a in enumerate(adapters):
        groups.setdefault((a.kind, a.shape, a.rank, a.scale), []).append(position)
    return list(groups.values())

"""Methods that PEFT has and that are no plain LoRA: DoRA, VeRA, VB-LoRA. Built by PEFT, trained as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from weightlora.errors import ConfigError
from weightlora.graft.tuners import dora_config, tuner_config
from weightlora.methods.base import M, Shapes, TunerMethod
from weightlora.settings import setting

if TYPE_CHECKING:
    from weightlora.graft.tuners import LoraConfig, PeftConfig


@dataclass(frozen=True, kw_only=True)
class DoRA(TunerMethod):
    """Weight-decomposed adapters: ``W' = m (W + s B A) / ||W + s B A||``, norms by output row.

    Parameters: ``sum r (d_in + d_out) + d_out``. Source: Liu et al. 2024; PEFT's ``use_dora``, whose backward pass
    takes the norm as a constant. Not `dynamic_lora`, whose authors call it DoRA too.
    """

    name: ClassVar[str] = "dora"
    kind: ClassVar[str] = "DORA"

    def rank(self, built: int) -> int:
        return built

    def peft_config(self, lora: LoraConfig, shapes: Shapes) -> PeftConfig:
        return dora_config(lora)

    def within(self: M, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[M, int]:
        each, rows = sum(i + o for i, o in shapes), sum(o for _, o in shapes)
        _check_fits(self.name, params, each + rows, "rank 1")
        return self, (params - rows) // each


@dataclass(frozen=True, kw_only=True)
class VeRA(TunerMethod):
    """One frozen random pair for all layers, two trained vectors each: ``dW = diag(lambda_b) B diag(lambda_d) A``.

    Args:
        r: rank of the frozen pair; the trained vectors are r and d_out long.
        d_initial: lambda_d at the start (lambda_b starts at 0, so dW = 0).
        key: seed of the projections.

    Parameters: ``n r + sum d_out``. Its learning rate is 10 times the run's: the authors of WeightLoRA run it at 8e-3
    where LoRA has 8e-4. Source: Kopiczko et al. 2024; PEFT's ``VeraConfig``.
    """

    name: ClassVar[str] = "vera"
    kind: ClassVar[str] = "VERA"
    spending: ClassVar[str] = "above a rank of 1024 the frozen pair costs more operations than the layers it sits on"
    rates: ClassVar[Mapping[str, float]] = {"vera_lambda": 10.0}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"official": {"r": 1024}}
    MAX_RANK: ClassVar[int] = 1024  # what the official script uses; more is all cost

    r: int = setting(256, least=1)
    d_initial: float = 0.1
    key: int = 0

    def rank(self, built: int) -> int:
        return self.r

    def peft_config(self, lora: LoraConfig, shapes: Shapes) -> PeftConfig:
        return tuner_config(
            self.kind, lora, r=self.r, d_initial=self.d_initial, projection_prng_key=self.key,
            vera_dropout=lora.lora_dropout, save_projection=True,
        )  # fmt: skip

    def within(self, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[VeRA, int]:
        rows = sum(o for _, o in shapes)
        _check_fits(self.name, params, rows + len(shapes), "rank 1")
        return replace(self, r=min((params - rows) // len(shapes), self.MAX_RANK)), rank


@dataclass(frozen=True, kw_only=True)
class VBLoRA(TunerMethod):
    """Every piece of A and B is a mix of `topk` vectors of one global bank; bank and logits are trained.

    Args:
        r: rank. num_vectors: size h of the bank. vector_length: b; it divides every d_in and d_out (None: the largest
            such number up to 256).
        topk: vectors in a mix.

    Parameters: ``h b + h sum r (d_in + d_out) / b``. dW is not 0 at the start. The logits' learning rate is 10 times
    the run's, as in the official runs (bank 1e-3, logits 1e-2). Source: Li et al. 2024; PEFT's ``VBLoRAConfig``.
    """

    name: ClassVar[str] = "vb_lora"
    kind: ClassVar[str] = "VBLORA"
    rate: ClassVar[float] = 10.0  # measured; see docs/methods.md
    rates: ClassVar[Mapping[str, float]] = {"vblora_logits": 10.0}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"official": {"vector_length": 256}}

    r: int = setting(4, least=1)
    num_vectors: int = 90
    vector_length: int | None = None
    topk: int = setting(2, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_vectors < self.topk:
            raise ConfigError(f"num_vectors={self.num_vectors} is less than topk={self.topk}; use at least that")

    def rank(self, built: int) -> int:
        return self.r

    def length(self, shapes: Shapes) -> int:
        """b for these shapes.

        Raises:
            ConfigError: the given one does not divide a dimension.
        """
        common = math.gcd(*(d for shape in shapes for d in shape))
        if self.vector_length is None:
            return next(b for b in range(min(256, common), 0, -1) if common % b == 0)
        if common % self.vector_length:
            raise ConfigError(
                f"vector_length={self.vector_length} must divide all dimensions; use a divisor of {common}"
            )
        return self.vector_length

    def peft_config(self, lora: LoraConfig, shapes: Shapes) -> PeftConfig:
        return tuner_config(
            self.kind, lora, r=self.r, num_vectors=self.num_vectors, vector_length=self.length(shapes),
            topk=self.topk, vblora_dropout=lora.lora_dropout,
        )  # fmt: skip

    def within(self, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[VBLoRA, int]:
        b = self.length(shapes)
        each = b + self.r * sum(i + o for i, o in shapes) // b
        _check_fits(self.name, params, self.topk * each, f"a bank of {self.topk} vectors")
        return replace(self, num_vectors=params // each), rank


def _check_fits(name: str, params: int, least: int, what: str) -> None:
    if params < least:
        raise ConfigError(f"{params} parameters are too few for {name} at {what}; use at least {least}")

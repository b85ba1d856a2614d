"""The adapter path: every gradient against the formula in float64 and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weightlora.errors import ConfigError
from weightlora.ops import ENGINES, engine

NAMES = ("x", "result", "A", "B", "gate")
GATES = [0.0, 1.0, 0.3, -1.7]
engines = pytest.mark.parametrize("name", sorted(ENGINES))


def inputs(lead: tuple[int, ...], d_in: int, d_out: int, r: int, gate: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x, result, A, B and gate in float64, all asking for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*lead, d_in), (*lead, d_out), (r, d_in), (d_out, r)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.requires_grad_() for t in (*tensors, torch.tensor(gate, dtype=torch.float64))]


def upstream(out: Tensor) -> Tensor:
    """A gradient from above with no symmetry, in multiples of 1/64: exact in every dtype."""
    wave = torch.sin(torch.arange(1.0, out.numel() + 1, dtype=torch.float64)).reshape(out.shape)
    return ((wave * 64).round() / 64).to(out.dtype)


def formula(tensors: list[Tensor], scale: float, kept: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Output and gradients, each from its own sum over tokens; ``kept``: the dropout mask over its probability."""
    x, result, A, B, gate = (t.detach() for t in tensors)
    dropped = (x * kept).reshape(-1, x.shape[-1])
    h = dropped @ A.T
    out = result + (scale * gate * (h @ B.T)).reshape(result.shape)
    g = upstream(out).reshape(-1, result.shape[-1])
    dense = g.T @ dropped  # gradient of the dense update
    return {
        "out": out,
        "x": ((scale * gate * (g @ B @ A)).reshape(x.shape)) * kept,
        "result": upstream(out),
        "A": scale * gate * (B.T @ dense),
        "B": scale * gate * (dense @ A.T),
        "gate": scale * (dense * (B @ A)).sum(),
    }


def measured(name: str, tensors: list[Tensor], scale: float, dropout: float = 0.0) -> dict[str, Tensor]:
    """The same from an engine and torch's autograd."""
    out = engine(name)(*tensors, scale, dropout)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, tensors, upstream(out))
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-12) -> None:
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        assert float((got[key] - value).abs().max()) <= bound * max(1.0, float(value.abs().max())), key


@engines
@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    gate=st.sampled_from(GATES),
    scale=st.sampled_from([1.0, 2.0, 0.125]),
)
@example(lead=(3,), sizes=(1, 1, 1), gate=0.0, scale=2.0)
@example(lead=(2, 3), sizes=(7, 5, 3), gate=0.0, scale=2.0)
def test_every_gradient_is_the_formula(
    name: str, lead: tuple[int, ...], sizes: tuple[int, int, int], gate: float, scale: float
) -> None:
    tensors = inputs(lead, *sizes, gate=gate, seed=sum(sizes))
    agree(measured(name, tensors, scale), formula(tensors, scale))


def mask_of(name: str, shape: torch.Size, dropout: float, seed: int) -> Tensor:
    """What an engine multiplies x with under this seed, read off its output for x = 1 and A = B = 1."""
    torch.manual_seed(seed)
    eye = torch.eye(shape[-1], dtype=torch.float64)
    ones = torch.ones(shape, dtype=torch.float64)
    return engine(name)(ones, torch.zeros_like(ones), eye, eye, None, 1.0, dropout)  # type: ignore[arg-type]


@engines
@pytest.mark.parametrize("gate", GATES)
def test_gradients_under_dropout_use_one_mask(name: str, gate: float) -> None:
    tensors = inputs((4, 5), 7, 6, 3, gate=gate)
    kept = mask_of(name, tensors[0].shape, 0.4, seed=11)
    assert sorted(set(kept.flatten().tolist())) == pytest.approx([0.0, 1 / 0.6])
    torch.manual_seed(11)
    agree(measured(name, tensors, 2.0, 0.4), formula(tensors, 2.0, kept))


def test_dropout_keeps_the_mean_and_the_share() -> None:
    kept = mask_of("autograd", torch.Size((400, 100)), 0.3, seed=0)
    share = float((kept > 0).double().mean())
    # 40,000 coin tosses: five standard deviations.
    assert abs(share - 0.7) < 5 * math.sqrt(0.7 * 0.3 / 40_000)
    assert float(kept.mean()) == pytest.approx(share / 0.7)


@engines
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_finite_differences(name: str, gate: float, lead: tuple[int, ...]) -> None:
    tensors = inputs(lead, 4, 3, 2, gate=gate)
    path = engine(name)  # type: ignore[arg-type]

    def dropped(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return path(*given, 1.5, 0.5)

    assert torch.autograd.gradcheck(lambda *given: path(*given, 1.5), tensors)
    assert torch.autograd.gradcheck(dropped, tensors)


@engines
def test_no_gate_is_a_gate_of_one(name: str) -> None:
    tensors = inputs((2, 3), 6, 5, 2)
    x, result, A, B, _ = tensors
    gated = measured(name, tensors, 2.0)
    out = engine(name)(x, result, A, B, None, 2.0)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, tensors[:4], upstream(out))
    agree({"out": out.detach(), **dict(zip(NAMES, grads, strict=False))}, {k: gated[k] for k in ("out", *NAMES[:4])})


@pytest.mark.parametrize("wanted", [{"A"}, {"B"}, {"x"}, {"gate"}, {"result"}, {"A", "B"}, {"B", "gate"}])
def test_only_what_is_asked_for_gets_a_gradient(wanted: set[str]) -> None:
    tensors = inputs((5,), 4, 3, 2, gate=0.7)
    for key, tensor in zip(NAMES, tensors, strict=True):
        tensor.requires_grad_(key in wanted)
    out = engine("autograd")(*tensors, 2.0)
    out.backward(upstream(out))
    want = formula(tensors, 2.0)
    for key, tensor in zip(NAMES, tensors, strict=True):
        if key in wanted:
            assert tensor.grad is not None
            assert torch.allclose(tensor.grad, want[key], rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


def kept_bytes(run: Callable[[], Tensor], excluded: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd holds after the forward pass."""
    known = {t.untyped_storage().data_ptr() for t in excluded}
    held: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(held.values())


@pytest.mark.parametrize(("name", "limit"), [("autograd", 1.0), ("reference", None)])
def test_bf16_base_with_fp32_adapters_keeps_one_bf16_input(name: str, limit: float | None) -> None:
    tokens, d, r = 64, 32, 4
    x = torch.randn(tokens, d, dtype=torch.bfloat16, requires_grad=True)
    result = torch.randn(tokens, d, dtype=torch.bfloat16)
    omega = torch.ones(3, requires_grad=True)
    pairs = [(torch.randn(r, d, requires_grad=True), torch.randn(d, r, requires_grad=True)) for _ in range(3)]

    def run() -> Tensor:
        outs = [engine(name)(x, result, A, B, omega[i], 2.0) for i, (A, B) in enumerate(pairs)]  # type: ignore[arg-type]
        return torch.stack(outs).sum()

    used = kept_bytes(run, [omega, *(f for pair in pairs for f in pair)])
    lean = x.nbytes + 3 * tokens * r * 4  # the shared input as it came, and one rank-r product an adapter
    if limit is not None:
        assert used == lean
    else:
        assert used >= lean + 3 * 2 * x.nbytes  # the readable engine: one float32 copy of x for each


def test_dropout_keeps_a_seed_and_no_mask() -> None:
    x, result, A, B, gate = (t.detach().float() for t in inputs((64,), 32, 16, 4))
    A.requires_grad_(), B.requires_grad_()
    used = kept_bytes(lambda: engine("autograd")(x, result, A, B, gate, 2.0, 0.1), [A, B, gate])
    assert used == x.nbytes + 64 * 4 * 4 + 8


@pytest.mark.parametrize(("wanted", "kept"), [("A", 64 * 32 * 4), ("B", 64 * 4 * 4), ("x", 0), ("result", 0)])
def test_what_no_gradient_needs_is_not_kept(wanted: str, kept: int) -> None:
    tensors = dict(zip(NAMES, (t.detach().float() for t in inputs((64,), 32, 16, 4)), strict=True))
    tensors[wanted].requires_grad_()
    factors = [tensors[key] for key in ("A", "B", "gate")]
    assert kept_bytes(lambda: engine("autograd")(*tensors.values(), 2.0), factors) == kept


@engines
def test_bf16_base_gradients_are_near_float64(name: str) -> None:
    tensors = inputs((6, 8), 16, 12, 4, gate=0.8)
    half = [t.detach().to(torch.bfloat16).requires_grad_() for t in tensors[:2]]
    full = [t.detach().float().requires_grad_() for t in tensors[2:]]
    got = measured(name, [*half, *full], 2.0)
    assert got["x"].dtype == torch.bfloat16
    assert [got[key].dtype for key in ("A", "B", "gate")] == [torch.float32] * 3
    want = formula([t.double() for t in (*half, *full)], 2.0)
    for key in NAMES:
        error = (got[key].double() - want[key]).norm() / want[key].norm()
        # Multiplied in float32; only what has the input's dtype is rounded to it (8 bits of mantissa).
        assert float(error) < (2**-8 if key in ("x", "result") else 1e-5), key


@engines
def test_autocast_multiplies_in_bf16_and_returns_fp32_gradients(name: str) -> None:
    tensors = [t.detach().float().requires_grad_() for t in inputs((6, 8), 16, 12, 4, gate=0.8)]
    x, _, A, B, gate = tensors
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        based = F.linear(x, W)
        out = engine(name)(x, based, A, B, gate, 2.0)  # type: ignore[arg-type]
    assert based.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, [x, A, B, gate], upstream(out))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    exact = [t.detach().double() for t in tensors]
    exact[1] = F.linear(exact[0], W.double())
    want = formula(exact, 2.0)
    want["x"] = want["x"] + upstream(want["out"]) @ W.double()
    # bfloat16 rounds to 1 part in 256 at each of five products; the readable engine sums the gate's gradient in it too.
    for key, got in zip(("out", "x", "A", "B", "gate"), (out, *grads), strict=True):
        assert float((got.detach().double() - want[key]).norm() / want[key].norm()) < 6e-2, key


@engines
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(name: str, dropout: float) -> None:
    tensors = inputs((3, 4), 6, 6, 2, gate=0.4)
    path = engine(name)  # type: ignore[arg-type]

    def block(x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
        return torch.tanh(path(torch.tanh(x), result, A, B, gate, 2.0, dropout))

    collected = []
    for recompute in (False, True):
        torch.manual_seed(5)
        out = checkpoint(block, *tensors, use_reentrant=False) if recompute else block(*tensors)
        collected.append(torch.autograd.grad(out, tensors, upstream(out)))
    for key, plain, again in zip(NAMES, *collected, strict=True):
        assert torch.equal(plain, again), key
        assert float(plain.abs().max()) > 0, key


def test_unknown_engine() -> None:
    with pytest.raises(ConfigError, match="engine 'triton-9' is unknown; use one of auto, autograd, reference, triton"):
        engine("triton-9")  # type: ignore[arg-type]

"""Growth: the value stays, the rank rises, the new rows are what they should be."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightlora.core.growth import Growth, Noise, grow
from weightlora.errors import AdapterError, ConfigError

VARIANTS: list[tuple[Growth, Noise, bool]] = list(
    product(("gaussian", "qr"), ("normal", "uniform"), (True, False))  # type: ignore[arg-type]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(r: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    A = torch.randn(r, d_in, generator=generator, dtype=torch.float64).to(dtype)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64).to(dtype)
    return A, B


def relative_error(grown_A: Tensor, grown_B: Tensor, A: Tensor, B: Tensor) -> float:
    old, new = B.double() @ A.double(), grown_B.double() @ grown_A.double()
    return float((new - old).norm() / old.norm().clamp_min(1e-30))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 9), st.integers(0, 9), st.sampled_from(VARIANTS))
def test_value_is_preserved(r: int, more: int, wide: int, tall: int, variant: tuple[Growth, Noise, bool]) -> None:
    mode, noise, orthonormal = variant
    A, B = factors(r, r + more + wide, r + more + tall)
    saved = A.clone(), B.clone()
    grown = grow(A, B, r + more, mode, generator=seeded(), noise=noise, orthonormal=orthonormal)
    assert grown.A.shape == (r + more, A.shape[1])
    assert grown.B.shape == (B.shape[0], r + more)
    assert relative_error(grown.A, grown.B, A, B) < 1e-12
    assert torch.equal(grown.B[:, r:], torch.zeros_like(grown.B[:, r:]))
    assert torch.equal(A, saved[0])
    assert torch.equal(B, saved[1])


@pytest.mark.parametrize(("mode", "noise", "orthonormal"), VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_value_dtype_and_rank(mode: Growth, noise: Noise, orthonormal: bool, dtype: torch.dtype, bound: float) -> None:
    A, B = factors(8, 96, 64, dtype)
    grown = grow(A, B, 32, mode, generator=seeded(), noise=noise, orthonormal=orthonormal)
    assert grown.A.dtype == grown.B.dtype == dtype
    assert relative_error(grown.A, grown.B, A, B) < bound
    assert int(torch.linalg.matrix_rank(grown.A.double())) == 32
    assert grown.mix is None or grown.mix.dtype == torch.float32


def test_gaussian_keeps_the_old_factors_and_the_row_norm() -> None:
    A, B = factors(4, 300, 50)
    grown = grow(A * 0.01, B, 12, generator=seeded())
    assert torch.equal(grown.A[:4], A * 0.01)
    assert torch.equal(grown.B[:, :4], B)
    assert grown.mix is None
    mean = (A * 0.01).norm(dim=1).mean()
    torch.testing.assert_close(grown.A[4:].norm(dim=1), mean.expand(8))
    from_zero = grow(torch.zeros_like(A), B, 5, generator=seeded())
    assert float(from_zero.A[4].norm()) == pytest.approx(1 / math.sqrt(3))


def test_new_rows_are_gaussian_in_direction() -> None:
    A, B = factors(1, 4000, 60)
    rows = grow(A, B, 60, generator=seeded()).A[1:]
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(0).abs()
    assert float(cosines.max()) < 6 / math.sqrt(4000)
    standard = rows.flatten() / rows.std()
    assert abs(float((standard**4).mean()) - 3) < 0.1  # the kurtosis of a normal; 1.8 for a uniform


def test_uniform_block_is_raw() -> None:
    A, B = factors(2, 768, 40)
    rows = grow(A, B, 40, generator=seeded(), noise="uniform").A[2:]
    assert 0 <= float(rows.min()) < 0.01
    assert 0.99 < float(rows.max()) < 1
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert float((unit @ unit.T)[0, 1:].mean()) == pytest.approx(0.75, abs=0.02)  # nearly collinear, as in that code
    assert float(rows.norm(dim=1).mean()) == pytest.approx(16, abs=0.3)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_qr_rows_are_orthogonal(noise: Noise) -> None:
    A, B = factors(8, 200, 64)
    grown = grow(A, B, 40, "qr", generator=seeded(), noise=noise)
    torch.testing.assert_close(grown.A @ grown.A.T, torch.eye(40, dtype=torch.float64), atol=1e-12, rtol=0)
    raw = grow(A, B, 40, "qr", generator=seeded(), noise=noise, orthonormal=False)
    assert float((raw.A[8:] @ A.T).abs().max()) < 1e-10  # orthogonal to the old rows, but not normalised
    assert float((raw.A[8:].norm(dim=1) - 1).abs().min()) > 0.1
    assert torch.equal(raw.A[:8], grown.A[:8])
    assert torch.equal(raw.B, grown.B)
    # Both span the same rows: the projection onto the orthonormal ones leaves the raw ones as they are.
    torch.testing.assert_close(raw.A[8:] @ grown.A[8:].T @ grown.A[8:], raw.A[8:])


def test_qr_completes_a_full_basis_in_float32() -> None:
    A, B = factors(8, 256, 300, torch.float32)
    grown = grow(A, B, 256, "qr", generator=seeded())
    assert float((grown.A @ grown.A.T - torch.eye(256)).abs().max()) < 1e-5


def test_second_projection_removes_the_rounding_error_of_the_first() -> None:
    # One direction is left; nearly all of the noise lies in the others and must cancel, which magnifies rounding.
    for seed in range(6):
        A, B = factors(255, 256, 256, torch.float32, seed)
        rows = grow(A, B, 256, "qr", generator=seeded(seed), noise="uniform").A
        assert float((rows[:255] @ rows[255]).abs().max()) < 2e-7


def test_mix_carries_gradients() -> None:
    A, B = factors(3, 20, 15)
    grown = grow(A, B, 5, "qr", generator=seeded())
    R = grown.mix
    assert R is not None
    assert torch.equal(R, R.triu())
    assert bool((R.diagonal() >= 0).all())
    torch.testing.assert_close(R.T @ grown.A[:3], A)
    torch.testing.assert_close(grown.B[:, :3], B @ R.T)

    def gradients(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        ((B @ A).sin() * torch.arange(20)).sum().backward()
        assert A.grad is not None
        assert B.grad is not None
        return A.grad, B.grad

    dA, dB = gradients(A, B)
    new_dA, new_dB = gradients(grown.A, grown.B)
    torch.testing.assert_close(new_dA[:3], R @ dA)
    torch.testing.assert_close(new_dB[:, :3], torch.linalg.solve(R, dB, left=False))
    assert float(new_dB[:, 3:].norm(dim=0).min()) > 0.1  # the new directions learn at once


@pytest.mark.parametrize(
    "A", [torch.zeros(3, 12), torch.ones(3, 12), torch.eye(12)[:3] * torch.tensor([[1.0], [0], [2]])]
)
@pytest.mark.parametrize("orthonormal", [True, False])
def test_qr_of_a_rank_deficient_factor(A: Tensor, orthonormal: bool) -> None:
    A, B = A.double(), factors(3, 12, 9)[1]
    grown = grow(A, B, 7, "qr", generator=seeded(), orthonormal=orthonormal)
    assert bool(grown.A.isfinite().all())
    assert bool(grown.B.isfinite().all())
    assert float((grown.B @ grown.A - B @ A).abs().max()) < 1e-12
    assert int(torch.linalg.matrix_rank(grown.A)) == 7


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("mode", ["gaussian", "qr"])
def test_memory_is_linear_in_the_width(mode: Growth) -> None:
    d, r_new = 20_000, 16
    A, B = factors(4, d, d, torch.float32)
    with LargestTensor() as largest:
        grow(A, B, r_new, mode, generator=seeded())
    assert r_new * d == largest.numel


@pytest.mark.parametrize(("mode", "noise", "orthonormal"), VARIANTS)
def test_only_the_generator_decides(mode: Growth, noise: Noise, orthonormal: bool) -> None:
    A, B = factors(3, 30, 20, torch.float32)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = grow(A, B, 6, mode, generator=seeded(5), noise=noise, orthonormal=orthonormal)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = grow(A, B, 6, mode, generator=seeded(5), noise=noise, orthonormal=orthonormal)
    other = grow(A, B, 6, mode, generator=seeded(6), noise=noise, orthonormal=orthonormal)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    assert not torch.equal(first.A[3:], other.A[3:])


def test_same_rank_and_parameters() -> None:
    A, B = (torch.nn.Parameter(factor) for factor in factors(3, 10, 7))
    same = grow(A, B, 3, generator=seeded())
    assert torch.equal(same.A, A)
    assert torch.equal(same.B, B)
    assert same.mix is None
    assert same.A.data_ptr() != A.data_ptr()
    assert same.B.data_ptr() != B.data_ptr()
    turned = grow(A, B, 3, "qr", generator=seeded())
    assert relative_error(turned.A, turned.B, A.detach(), B.detach()) < 1e-12
    for grown in (same, turned):
        assert not grown.A.requires_grad
        assert grown.A.is_contiguous()
        assert grown.B.is_contiguous()


def test_wrong_arguments() -> None:
    A, B = factors(4, 10, 8)
    with pytest.raises(ConfigError, match="r_new=3 is not allowed for this adapter of rank 4"):
        grow(A, B, 3, generator=seeded())
    with pytest.raises(ConfigError, match=r"r_new=9 .*at most 8"):
        grow(A, B, 9, generator=seeded())
    with pytest.raises(ConfigError, match=r"r_new=9 .*at most 8"):
        grow(B.T.contiguous(), A.T.contiguous(), 9, generator=seeded())
    with pytest.raises(AdapterError, match="B holds NaN"):
        grow(A, B * float("nan"), 6, generator=seeded())

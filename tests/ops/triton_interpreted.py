"""The Triton kernels on the CPU. ``test_ops_triton.py`` runs it: ``TRITON_INTERPRET=1`` must be set from the start."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch
from tests.builders import a_third
from tests.ops.test_on_gpu import rehearsal
from tests.ops.test_ops_engines import GATES, NAMES, formula, inputs, upstream
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightlora.errors import ConfigError
from weightlora.ops import autograd, engine, triton_path
from weightlora.ops.triton_path import TritonProducts, adapter_path

KERNELS = TritonProducts()
# One rounding to the dtype, and the interpreter rounds to bfloat16 by cutting off: a whole unit in the last place.
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]
SIZES = [(1, 1, 1), (45, 70, 5), (64, 128, 16), (33, 65, 17), (20, 30, 64)]


def mask(tokens: int, width: int, p: float, seed: int) -> Tensor:
    """What the kernels keep under this seed, drawn by the one that spreads."""
    if p == 0.0:
        return torch.ones(tokens, width, dtype=torch.float64)
    ones = KERNELS.back(torch.ones(tokens, 1), None, torch.ones(1, width), torch.float32, p, seed)[1]
    assert ones is not None
    return ones.double()


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert float((got.double() - want).norm()) <= UNIT[dtype] * float(want.norm())


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("dtypes", "sizes", "p"), a_third(itertools.product(DTYPES, SIZES, [0.0, 0.3]), first=0))
def test_products(dtypes: tuple[torch.dtype, torch.dtype], sizes: tuple[int, int, int], p: float) -> None:
    (x_dtype, dtype), (tokens, width, rank) = dtypes, sizes
    x, A = random(tokens, width, dtype=x_dtype, seed=0), random(rank, width, dtype=dtype, seed=1)
    u, kept = random(tokens, rank, dtype=dtype, seed=2), mask(tokens, width, p, seed=77)
    dropped = x.double() * kept
    near(KERNELS.down(x, A, dtype, p, 77), dropped @ A.double().T, dtype)
    grad_A, grad_x = KERNELS.back(u, x, A, x_dtype, p, 77)
    assert grad_A is not None
    assert grad_x is not None
    near(grad_A, u.double().T @ dropped, dtype)
    near(grad_x, u.double() @ A.double() * kept, x_dtype)
    near(KERNELS.outer(u, x), u.double().T @ x.double(), dtype)
    out, B = random(tokens, width, dtype=x_dtype, seed=3), random(width, rank, dtype=dtype, seed=4)
    want = out.double() + 1.5 * u.double() @ B.double().T
    near(KERNELS.add(out, u, B, 1.5, False), want, x_dtype)
    assert KERNELS.add(out, u, B, 1.5, True) is out
    near(out, want, x_dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_kernels_themselves_also_where_torch_would_do(p: float) -> None:
    x, u = random(45, 70, dtype=torch.float32, seed=0), random(45, 5, dtype=torch.float32, seed=1)
    near(KERNELS._outer(u, x, p, 5), u.double().T @ (x.double() * mask(45, 70, p, 5)), torch.float32)
    out = torch.full((45, 70), float("nan"))
    B = random(70, 5, dtype=torch.float32, seed=2)
    KERNELS._up(None, out, u, B, -2.0, p, 5)
    near(out, -2.0 * u.double() @ B.double().T * mask(45, 70, p, 5), torch.float32)


def test_the_width_and_the_tokens_are_split_among_programs() -> None:
    """More blocks than one program of each token or width takes, so that partial sums are added up."""
    tokens, width, rank = 70, 700, 3
    x, A = random(tokens, width, dtype=torch.bfloat16, seed=0), random(rank, width, dtype=torch.float32, seed=1)
    u, kept = random(tokens, rank, dtype=torch.float32, seed=2), mask(tokens, width, 0.2, 9)
    near(KERNELS.down(x, A, torch.float32, 0.2, 9), x.double() * kept @ A.double().T, torch.float32)
    near(KERNELS._outer(u, x, 0.2, 9), u.double().T @ (x.double() * kept), torch.float32)


def test_ranks_beyond_the_kernels_are_torchs() -> None:
    tensors = [t.detach().float().requires_grad_() for t in inputs((4, 5), 71, 70, 65)]
    found = []
    for path in (adapter_path, triton_path.adapter_path_or_torch, autograd.adapter_path):
        torch.manual_seed(7)
        out = path(*tensors, 2.0, 0.3)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(out, tensors, upstream(out)))
    for one in found[:2]:
        assert all(torch.equal(got, want) for got, want in zip(one, found[2], strict=True))


def test_a_seed_may_lie_on_the_device() -> None:
    """What a CUDA graph captures: the kernels read the seed, and the next replay finds another one there."""
    x, A, seed = random(20, 30, dtype=torch.float32, seed=0), random(4, 30, dtype=torch.float32, seed=1), 2**61 + 5
    on_device = KERNELS.down(x, A, torch.float32, 0.4, torch.tensor(seed))
    assert torch.equal(on_device, KERNELS.down(x, A, torch.float32, 0.4, seed))
    assert not torch.equal(on_device, KERNELS.down(x, A, torch.float32, 0.4, torch.tensor(seed + 1)))


def test_strided_inputs() -> None:
    wide = random(45, 140, dtype=torch.bfloat16, seed=0)
    x, A = wide[:, ::2], random(70, 5, dtype=torch.float32, seed=1).T
    near(KERNELS.down(x, A, torch.float32, 0.2, 3), x.double() * mask(45, 70, 0.2, 3) @ A.double().T, torch.float32)


def test_mask_statistics() -> None:
    n, p = (256, 512), 0.05
    masks = [mask(*n, p, seed) for seed in (1, 2, 2**62 + 7)]
    for one in masks:
        assert abs(float(one.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / one.numel())
        centred = one - (1 - p)
        for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
            assert abs(float(shifted.mean())) / (p * (1 - p)) < 5 / math.sqrt(shifted.numel())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        together = float(((masks[one] - (1 - p)) * (masks[other] - (1 - p))).mean()) / (p * (1 - p))
        assert abs(together) < 5 / math.sqrt(masks[one].numel())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_gradient_is_the_formula(gate: float, dropout: float) -> None:
    exact = inputs((4, 5), 21, 18, 3, gate=gate)
    tensors = [t.detach().float().requires_grad_() for t in exact]
    torch.manual_seed(7)
    seed = int(autograd.draw_seed())
    kept = mask(20, 21, dropout, seed).reshape(4, 5, 21) / (1 - dropout)
    torch.manual_seed(7)
    out = adapter_path(*tensors, 2.0, dropout)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, tensors, upstream(out))
    want = formula([t.detach().double() for t in tensors], 2.0, kept)
    for key, got in zip(("out", *NAMES), (out.detach(), *grads), strict=True):
        assert float((got.double() - want[key]).abs().max()) <= 1e-5 * max(1.0, float(want[key].abs().max())), key


def test_float32_adapters_on_a_bfloat16_base() -> None:
    exact = inputs((6, 8), 33, 18, 4, gate=0.8)
    half = [t.detach().bfloat16().requires_grad_() for t in exact[:2]]
    full = [t.detach().float().requires_grad_() for t in exact[2:]]
    out = adapter_path(*half, *full, 2.0)  # type: ignore[arg-type]
    grads = dict(zip(NAMES, torch.autograd.grad(out, [*half, *full], upstream(out)), strict=True))
    want = formula([t.detach().double() for t in (*half, *full)], 2.0)
    for key, bound in (("x", 2**-7), ("A", 1e-5), ("B", 1e-5), ("gate", 1e-5)):
        assert float((grads[key].double() - want[key]).norm()) <= bound * float(want[key].norm()), key


def test_checkpointing_draws_the_same_mask() -> None:
    tensors = [t.detach().float().requires_grad_() for t in inputs((3, 4), 9, 7, 2, gate=0.4)]

    def block(*given: Tensor) -> Tensor:
        return torch.tanh(adapter_path(*given, 2.0, 0.3))  # type: ignore[arg-type]

    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        out = checkpoint(block, *tensors, use_reentrant=False) if recompute else block(*tensors)
        found.append(torch.autograd.grad(out, tensors, upstream(out)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_dtype_without_kernels_is_refused_and_auto_falls_back() -> None:
    tensors = inputs((3,), 4, 3, 2)
    with pytest.raises(ConfigError, match=r"engine 'triton' cannot run: .*float64"):
        adapter_path(*tensors, 2.0)  # type: ignore[arg-type]
    out = triton_path.adapter_path_or_torch(*tensors, 2.0)  # type: ignore[arg-type]
    assert torch.allclose(out, autograd.adapter_path(*tensors, 2.0))  # type: ignore[arg-type]


def test_the_engine_table(caplog: pytest.LogCaptureFixture) -> None:
    assert engine("triton") is adapter_path
    with caplog.at_level(logging.INFO, logger="weightlora"):
        assert engine("auto") is triton_path.adapter_path_or_torch
        assert engine("auto") is triton_path.adapter_path_or_torch
    assert [record.getMessage() for record in caplog.records] == ["adapter path: triton"]


def test_in_a_model() -> None:
    from peft import LoraConfig, get_peft_model

    from weightlora.graft.forms import Gates

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 12)).bfloat16(), LoraConfig(r=3, target_modules=["0"]))
    nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    x, found = torch.randn(9, 20).bfloat16(), []
    for name in ("triton", "autograd"):
        gates = Gates(model, engine_name=name, value=0.7)  # type: ignore[arg-type]
        model.zero_grad()
        model(x).float().square().sum().backward()
        assert gates.omega.grad is not None
        found.append([gates.omega.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        gates.detach()
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 2e-2 * float(other.norm())


def test_interpreting() -> None:
    assert triton_path.INTERPRETED


@pytest.mark.long
def test_the_visit_to_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal(tmp_path, lambda: capsys.readouterr().out)

"""The lean engine where a model meets it: in place, checkpointed, compiled, quantised, dropping by a seed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tests.builders import long
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightlora.graft.fast import fast_path
from weightlora.graft.forms import Gates
from weightlora.ops import engine
from weightlora.ops.dropout import PORTION, draw_seed, drawn, drop_, positions

path = engine("autograd")


def pair(d_in: int = 6, d_out: int = 5, r: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(r, d_in, generator=generator).requires_grad_(),
        torch.randn(d_out, r, generator=generator).requires_grad_(),
    )


# What happens to the base layer's output


def test_a_base_layers_output_is_reused() -> None:
    A, B = pair()
    x = torch.randn(2, 3, 6, requires_grad=True)
    result = F.linear(x, torch.randn(5, 6), torch.randn(5))
    before = result.detach().clone()
    out = path(x, result, A, B, None, 2.0)
    assert out.data_ptr() == result.data_ptr()
    assert torch.allclose(out, before + 2.0 * (x @ A.T) @ B.T, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_what_follows_may_work_in_place(bias: bool) -> None:
    A, B = pair()
    torch.manual_seed(0)
    x, W, b = torch.randn(2, 3, 6, requires_grad=True), torch.randn(5, 6), torch.randn(5) if bias else None
    grads = []
    for in_place in (True, False):
        out = path(x, F.linear(x, W, b), A, B, None, 2.0)
        out = out.mul_(2.0).relu_() if in_place else (out * 2.0).relu()
        grads.append(torch.autograd.grad(out.square().sum(), [x, A, B]))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_a_leaf_or_the_input_itself_is_left_alone() -> None:
    A, B = pair(6, 6)
    leaf = torch.randn(3, 6)
    kept = leaf.clone()
    path(torch.randn(3, 6, requires_grad=True), leaf, A, B, None, 2.0)
    assert torch.equal(leaf, kept)
    x = torch.randn(3, 6, requires_grad=True) * 1.0
    kept = x.detach().clone()
    path(x, x, A, B, None, 2.0)
    assert torch.equal(x.detach(), kept)


def test_whoever_saved_the_output_is_told() -> None:
    A, B = pair()
    x = torch.randn(3, 6, requires_grad=True)
    result = F.linear(x, torch.randn(5, 6))
    saved = torch.tanh(result) * result  # the product's gradient reads `result` again
    path(x, result, A, B, None, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(autocast: bool, mode: type) -> None:
    A, B = pair()
    torch.manual_seed(0)
    x, W = torch.randn(2, 3, 6), torch.randn(5, 6)
    want = F.linear(x, W) + 2.0 * (x @ A.T) @ B.T
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = path(x, F.linear(x, W), A, B, None, 2.0)
    assert torch.allclose(got.float(), want, rtol=5e-2 if autocast else 1e-5, atol=5e-2 if autocast else 1e-5)


# Dropout


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_share_of_dropped_entries(p: float) -> None:
    n, runs = 50_000, 20
    shares = [positions(n, p, seed).numel() / n for seed in range(runs)]
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(sum(shares) / runs - p) < 5 * deviation / math.sqrt(runs)
    # The spread is the binomial's: chi-squared with 20 degrees of freedom lies in (3.6, 56) but once in 100,000.
    assert 3.6 < sum(((share - p) / deviation) ** 2 for share in shares) < 56


def test_entries_are_independent_of_their_place_and_of_each_other() -> None:
    p, n, runs = 0.2, 400, 4000
    hits = torch.zeros(runs, n, dtype=torch.float64)
    for seed in range(runs):
        hits[seed, positions(n, p, seed)] = 1.0
    # Every place is dropped equally often, ...
    z = (hits.mean(0) - p) / math.sqrt(p * (1 - p) / runs)
    assert float(z.abs().max()) < 5
    assert 0.8 < float(z.square().mean()) < 1.2
    # ... and neighbours, or entries a row apart, know nothing of each other; nor do calls with consecutive seeds.
    centred = hits - p
    for one, other in (
        (centred[:, :-1], centred[:, 1:]),
        (centred[:, :-20], centred[:, 20:]),
        (centred[:-1], centred[1:]),
    ):
        correlation = float((one * other).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_gaps_are_geometric() -> None:
    p, n = 0.1, 400_000
    gaps = positions(n, p, seed=3).diff() - 1
    for length in range(12):
        expected = p * (1 - p) ** length
        share = float((gaps == length).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / gaps.numel()), length


def test_large_inputs_are_drawn_in_portions() -> None:
    n = 3 * PORTION
    found = positions(n, 0.9, seed=0)
    assert found.numel() > PORTION
    assert bool((found.diff() > 0).all())
    assert int(found[0]) < 50
    assert n - 50 < int(found[-1]) < n


def test_positions_at_the_edges() -> None:
    assert positions(0, 0.3, seed=0).numel() == 0
    assert positions(7, 1.0, seed=0).tolist() == list(range(7))
    assert all(int(p) == 0 for seed in range(50) for p in positions(1, 0.5, seed))


def test_a_mask_follows_from_its_seed_alone() -> None:
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for dtype in (torch.float32, torch.bfloat16):
                t = torch.ones(300, 500, dtype=dtype)
                masks.append(drop_(t, drawn(t, 0.05, seed=9)) == 0)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])
    other = torch.ones(300, 500)
    assert not torch.equal(masks[0], drop_(other, drawn(other, 0.05, seed=10)) == 0)


def test_every_adapter_draws_its_own_mask_and_the_run_repeats() -> None:
    torch.manual_seed(4)
    first = [int(draw_seed()) for _ in range(100)]
    assert len(set(first)) == 100
    torch.manual_seed(4)
    assert [int(draw_seed()) for _ in range(100)] == first


def test_everything_dropped() -> None:
    A, B = pair()
    x, result = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)
    out = path(x, result, A, B, None, 2.0, 1.0)
    assert torch.equal(out, result)
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(out.sum(), [x, A, B]))


def test_expectation_is_the_undropped_output() -> None:
    A, B = (factor.detach().double() for factor in pair())
    x, zero = torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    torch.manual_seed(0)
    draws = torch.stack([path(x, zero, A, B, None, 1.0, 0.3) for _ in range(4000)])
    want = (x @ A.T) @ B.T
    assert float(((draws.mean(0) - want) / (draws.std(0) / math.sqrt(4000))).abs().max()) < 5


# Checkpointing


@pytest.mark.parametrize("preserve", [True, False])
def test_a_recomputed_mask_is_consistent(preserve: bool) -> None:
    """Also where the caller does not restore the generator: all gradients then belong to the second mask."""
    d = 12
    eye = torch.eye(d, dtype=torch.float64)
    A = eye.clone().requires_grad_()
    x = torch.randn(40, d, dtype=torch.float64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return path(x, x * 0.0, A, eye, None, 1.0, 0.4)

    torch.manual_seed(0)
    out = checkpoint(block, x, use_reentrant=False, preserve_rng_state=preserve)
    grad_x, grad_A = torch.autograd.grad(out, [x, A], torch.ones_like(out))
    # d out / d x is the mask over its probability; dA = sum over tokens of g x_dropped.
    mask = grad_x
    assert sorted({round(v, 6) for v in mask.flatten().tolist()}) == [0.0, round(1 / 0.6, 6)]
    assert torch.allclose(grad_A, (mask * x.detach()).sum(0).expand(d, d))
    assert torch.equal(mask * x.detach(), out.detach()) is preserve


# Compiling


@pytest.fixture
def compiler() -> Iterator[None]:
    """A clean compiler; what it warns of itself is not ours to mend."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x)))
        return out


def adapted(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, lora_dropout=dropout, target_modules=["one", "two"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def gradients(model: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("compiler")
# The code that inductor writes is its own matter; it takes long, and one graph shows that it takes ours.
@pytest.mark.parametrize(("backend", "gated"), [("aot_eager", True), ("aot_eager", False), *long(("inductor", True))])
def test_compiled_numbers_are_the_same(backend: str, gated: bool) -> None:
    model = adapted()
    gates = Gates(model, value=0.7) if gated else None
    if not gated:
        assert fast_path(model, engine_name="autograd") == 2
    x = torch.randn(5, 8)
    want = gradients(model, model, x)
    gate = None if gates is None or gates.omega.grad is None else gates.omega.grad.clone()
    if gates is not None:
        gates.omega.grad = None
    got = gradients(model, torch.compile(model, backend=backend), x)
    assert len(got) == len(want) == 5
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    if gates is not None:
        assert gate is not None
        assert gates.omega.grad is not None
        assert torch.allclose(gates.omega.grad, gate, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiler")
def test_compiled_dropout_drops() -> None:
    model = adapted(dropout=0.5).train()
    fast_path(model, engine_name="autograd")
    run = torch.compile(model, backend="aot_eager")
    x = torch.randn(50, 8)
    assert not torch.equal(run(x), run(x))
    model.eval()
    assert torch.equal(run(x), run(x))


# Quantised bases


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes says which of its CPU kernels it found
def test_quantised_base(kind: str, gated: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: quantised bases are not tested here")
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    if kind == "4bit":
        base = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    base.load_state_dict(plain.state_dict())
    net = nn.Sequential(base.to("cpu"))
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "8bit", kind == "4bit"
    stock = get_peft_model(net, LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(next(p for n, p in stock.named_parameters() if "lora_B" in n))
    layer = stock.base_model.model[0]
    assert type(layer).__name__ == ("Linear4bit" if kind == "4bit" else "Linear8bitLt")
    x = torch.randn(7, 64, requires_grad=True)

    def run() -> list[Tensor]:
        stock.zero_grad()
        x.grad = None
        out = stock(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in stock.parameters() if p.grad is not None)]  # type: ignore[list-item]

    want = [copy.deepcopy(t) for t in run()]
    gates = Gates(stock) if gated else None
    assert gated or fast_path(stock, engine_name="autograd") == 1
    for one, other in zip(run(), want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert gates is None or gates.omega.grad is not None

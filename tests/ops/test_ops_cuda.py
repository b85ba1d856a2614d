"""On a CUDA device: the formula by both lean engines, repeatable masks, and a step that never waits for the host."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.ops.test_ops_engines import NAMES, formula, inputs, upstream
from torch import nn

from weightlora.graft.forms import Gates
from weightlora.ops import engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: nothing was run on one")
LEAN = ["autograd", *(["triton"] if importlib.util.find_spec("triton") else [])]
engines = pytest.mark.parametrize("name", LEAN)


@engines
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_gradient_is_the_formula(name: str, dropout: float) -> None:
    exact = inputs((3, 50), 96, 160, 8, gate=0.7)
    tensors = [t.detach().float().cuda().requires_grad_() for t in exact]
    eye = torch.eye(96, device="cuda")
    torch.manual_seed(3)
    ones = torch.ones(3, 50, 96, device="cuda")
    kept = engine(name)(ones, torch.zeros_like(ones), eye, eye, None, 1.0, dropout)  # type: ignore[arg-type]
    kept = (kept > 0.5).double() / (1.0 - dropout)
    torch.manual_seed(3)
    out = engine(name)(*tensors, 2.0, dropout)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, tensors, upstream(out.cpu()).cuda())
    want = formula([t.detach().cpu().double() for t in tensors], 2.0, kept.cpu())
    for key, got in zip(("out", *NAMES), (out.detach(), *grads), strict=True):
        assert float((got.cpu().double() - want[key]).norm()) <= 1e-5 * float(want[key].norm()), key


@engines
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gated_step_never_waits_for_the_host(name: str, dropout: float) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).cuda().bfloat16()
    model = get_peft_model(net, LoraConfig(r=4, lora_dropout=dropout, target_modules=["0", "2"])).train()
    gates = Gates(model, engine_name=name)  # type: ignore[arg-type]
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    for strict in (False, True):  # the first step compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            model(x).float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert gates.omega.grad is not None
    assert bool(torch.isfinite(gates.omega.grad).all())

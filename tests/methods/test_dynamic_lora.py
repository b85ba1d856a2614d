"""Dynamic LoRA against dense computations, and through the seam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import batch, batches, logits, lora
from torch import nn

import weightlora as wl
from weightlora.core.components import component_shares, rising_cuts, unevenness
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.training import Tuner, attach

N, M = 6, 30
SHORT: dict[str, Any] = {"tinit": 5, "tfinal": 9, "deltaT": 4}


def start(model: nn.Module, made: Any) -> tuple[torch.optim.Optimizer, Tuner]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    return optimizer, attach(model, made, optimizer, max_steps=M)


def gates(tuner: Tuner) -> torch.Tensor:
    return tuner._driver.formed.form.values.detach()  # type: ignore[union-attr, attr-defined, no-any-return]


def test_share_is_that_of_the_dense_components() -> None:
    torch.manual_seed(0)
    A, B, c = torch.randn(3, 7).double(), torch.randn(5, 3).double(), torch.randn(3).double()
    dense = torch.stack([c[i] * torch.outer(B[:, i], A[i]) for i in range(3)])
    wanted = dense.flatten(1).norm(dim=1) / (dense.sum(0).norm() + 1e-8)
    torch.testing.assert_close(component_shares(A, B, c), wanted)
    A, B = torch.linalg.qr(A.T)[0].T, torch.linalg.qr(B)[0]
    assert abs(float(component_shares(A, B, c).square().sum()) - 1) < 1e-6
    assert torch.count_nonzero(component_shares(A, B, 0 * c)) == 0


def test_regulariser_against_its_definition() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(3, 7), torch.randn(5, 3)) for _ in range(2)]
    total = sum(float(row.var()) for A, B in pairs for row in (*A, *B.T))
    assert abs(float(unevenness(pairs)) - total / (2 * 2 * 3)) < 1e-6
    assert float(unevenness([(torch.full((2, 4), 3.0), torch.ones(5, 2))])) == 0.0


def test_starts_at_zero_with_the_papers_bounds() -> None:
    model = lora()
    _, tuner = start(model, wl.DynamicLoRA(**SHORT))
    assert torch.count_nonzero(gates(tuner)) == 0
    assert {a.scale for a in adapters(model)} == {2.0 * 4 / 6}
    for A, B in tuner._driver._factors:
        assert 0.9 * (6 / 16) ** 0.5 < float(A.detach().abs().max()) <= (6 / 16) ** 0.5
        assert 0.9 < float(B.detach().abs().max()) <= 1.0


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_cuts_follow_the_cube_and_end_for_good(preset: str, tmp_path: Path) -> None:
    made = wl.DynamicLoRA.from_preset(preset, **SHORT)
    model, last = lora(), 21
    optimizer, tuner = start(model, made)
    policy: Any = tuner._driver.policy
    stream, frozen = batches(), None
    smooth = torch.zeros(36)
    for step in range(1, M + 1):
        for _ in range(2):
            (model(**next(stream)).loss / 2).backward()
        optimizer.step()
        if step <= last:  # the share of dense components, smoothed in a second place, decides who falls
            c = gates(tuner).split_with_sizes([6] * N)
            parts = [c[i][None] * B.detach() for i, (_, B) in enumerate(tuner._driver._factors)]
            rows = [A.detach() for A, _ in tuner._driver._factors]
            dense = [torch.einsum("oi,id->iod", P, A) for P, A in zip(parts, rows, strict=True)]
            smooth = 0.9 * smooth + 0.1 * torch.cat([d.flatten(1).norm(dim=1) / d.sum(0).norm() for d in dense])
        tuner.step()
        optimizer.zero_grad()
        if step == last and preset == "recommended":
            assert tuner.selection is not None
            assert tuner.selection.step == last
            break
        off = gates(tuner) == 0
        if step in (5, 9, 13, 17, 21):
            count = max(1, int(12 * ((step - 5) / 16) ** 3))
            assert count == rising_cuts(step - 5, 16, 36, 24)
            assert set(off.nonzero().flatten().tolist()) == set(smooth.argsort()[:count].tolist())
            frozen = off
        elif step < last:
            assert not off.any(), step
        else:
            assert torch.equal(off, frozen)  # type: ignore[arg-type]  # in spite of Adam's momentum
            assert policy.penalty(tuner._driver._view(1.0)) is None
    before = logits(model, batch())
    tuner.finish()
    torch.testing.assert_close(logits(model, batch()), before, atol=1e-5, rtol=1e-5)
    live = adapters(model)
    assert sum(a.rank for a in live) == N * 4
    assert all(abs(a.scale - 8 / 6) < 1e-12 for a in live)
    gate = 1 if preset == "paper" else 0
    assert policy.setup.count(live) == sum(a.rank * (a.d_in + a.d_out + gate) for a in live)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert export(model, tmp_path / "out", sample=batch()).max_difference <= 1e-5
    model(**batch()).loss.backward()
    optimizer.step()


def test_bfloat16_goes_through_the_seam() -> None:
    model = lora().to(torch.bfloat16)
    optimizer, tuner = start(model, wl.DynamicLoRA(**SHORT))
    for _, inputs in zip(range(M), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    assert tuner.finish().step == 21
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model, batch())).all()


def test_without_cuts_nothing_falls() -> None:
    model = lora()
    optimizer, tuner = start(model, wl.DynamicLoRA.from_preset("paper", **SHORT, init_r=4))
    for _, inputs in zip(range(M), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        assert torch.count_nonzero(gates(tuner)) == N * 4


def test_refuses_what_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"beta=1\.0 is not allowed"):
        wl.DynamicLoRA(beta=1.0)
    with pytest.raises(ConfigError, match="dem_weight=-1 is not allowed"):
        wl.DynamicLoRA(dem_weight=-1)
    with pytest.raises(ScheduleError, match="leave none of the 30 optimizer steps"):
        start(lora(), wl.DynamicLoRA(tinit=20, tfinal=10))

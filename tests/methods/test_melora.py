"""MELoRA against the dense block-diagonal update."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, batch, logits, lora, max_difference, warm
from tests.methods.test_methods_battery import STEPS, Loop
from torch import Tensor, nn

import weightlora as wl
from weightlora.errors import AdapterError, ConfigError
from weightlora.graft.adapters import adapters, parameters
from weightlora.methods import LoRA, MELoRA
from weightlora.training import attach


def dense(A: Tensor, B: Tensor, n: int) -> Tensor:
    """``blockdiag(B_i A_i)``, slice by slice."""
    out = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    wide, high = A.shape[1] // n, B.shape[0] // n
    for i in range(n):
        rows, columns = slice(i * high, (i + 1) * high), slice(i * wide, (i + 1) * wide)
        out[rows, columns] = B[rows].double() @ A[:, columns].double()
    return out


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("inputs", [(5, 8), (3, 5, 8)])
def test_equals_the_dense_block_diagonal_update(n: int, inputs: tuple[int, ...]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 12)), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    base = copy.deepcopy(model.base_model.model[0].base_layer)
    tuner = attach(model, MELoRA(minis=n), torch.optim.SGD(model.parameters(), lr=0.1))
    warm(model)
    A, B = next(iter(parameters(model, "default").values()))
    x = torch.randn(*inputs)
    dW = dense(A.detach(), B.detach(), n)
    assert torch.linalg.matrix_rank(dW) == 2 * n
    expected = base(x).double() + 1.5 * x.double() @ dW.T
    assert torch.allclose(model(x).double(), expected, atol=1e-5)
    tuner.finish()
    (plain,) = adapters(model)
    assert (plain.rank, plain.scale) == (2 * n, 1.5)
    assert torch.allclose(model(x).double(), expected, atol=1e-5)


def test_one_mini_is_lora() -> None:
    one, plain = (Loop.start(made, path="stock").run(STEPS) for made in (MELoRA(minis=1), LoRA()))
    one.tuner.finish()
    plain.tuner.finish()
    assert max_difference(adapter_state(one.model), adapter_state(plain.model)) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 8])
def test_minis_start_with_their_own_fan_in_and_cost_what_lora_costs(n: int) -> None:
    loop = Loop.start(MELoRA(minis=n))
    for A, B in parameters(loop.model, "default").values():
        bound = (n / A.shape[1]) ** 0.5
        assert 0.8 * bound < float(A.detach().abs().max()) <= bound * (1 + 1e-6)
        assert not B.detach().any()
    policy = loop.tuner._driver.policy
    trained = sum(p.numel() for name, p in loop.model.named_parameters() if "lora_" in name and p.requires_grad)
    loop.run(2).tuner.finish()
    assert policy.setup.count(adapters(loop.model)) == trained == 6 * 4 * (16 + 16)


def test_exports_what_it_computes(tmp_path: Path) -> None:

    loop = Loop.start(MELoRA(minis=4)).run(STEPS)
    live = logits(loop.model, batch())
    loop.tuner.finish()
    assert torch.allclose(logits(loop.model, batch()), live, atol=1e-5)
    assert wl.export(loop.model, tmp_path / "out", "portable").max_difference < 1e-5


def test_a_count_that_does_not_divide_is_refused_and_nothing_is_changed() -> None:
    model = lora()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"minis=3 does not divide the 16 inputs of .*query; use a divisor of 16"):
        Loop.start(MELoRA(minis=3), model)
    assert max_difference(dict(model.state_dict()), before) == 0.0
    from peft import LoraConfig, get_peft_model

    net: Any = get_peft_model(nn.Sequential(nn.Linear(8, 12)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match=r"minis=8 does not divide the 12 outputs of 0; use a divisor of 12"):
        attach(net, MELoRA(minis=8), torch.optim.SGD(net.parameters(), lr=0.1))
    for wrong in (0, True, 2.0):
        with pytest.raises(ConfigError, match=r"minis=.* is not allowed"):
            MELoRA(minis=wrong)  # type: ignore[arg-type]

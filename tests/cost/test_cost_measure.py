"""Counted bytes and operations: against counts by hand, and the numbers that the project stands for."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.builders import QKV, batch, lora
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from weightlora.cost import StepCost, kept_bytes, step_cost
from weightlora.graft.adapters import adapters
from weightlora.graft.surgery import disconnect


def test_bytes_and_flops_of_a_small_net_by_hand() -> None:
    tokens, d, hidden, out = 5, 6, 7, 3
    net = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, out))
    x = torch.randn(tokens, d)
    cost = step_cost(net, lambda: net(x).sum())
    # The first product keeps x; tanh keeps its output, which is the second product's input: one storage, counted once.
    assert cost.kept_activation_bytes == 4 * (tokens * d + tokens * hidden)
    forward = 2 * tokens * (d * hidden + hidden * out)
    # Backward: both weights' gradients, and the input's gradient of the second product only.
    assert cost.flops == forward + forward + 2 * tokens * hidden * out


@pytest.mark.parametrize("count", [kept_bytes, step_cost])
def test_nothing_of_a_counted_forward_pass_stays_in_memory(count: Callable[..., object]) -> None:
    """Tanh saves its own output, which holds tanh's node: a circle; backward does not free a branch off the loss."""
    net = nn.Linear(4, 4)
    made: list[weakref.ref[Tensor]] = []

    def loss() -> Tensor:
        beside, kept = net(torch.ones(3, 4)).tanh(), net(torch.ones(3, 4)).tanh()
        made.extend(map(weakref.ref, (beside, kept)))
        return kept.sum()

    assert count(net, loss)
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_an_adapter_by_hand() -> None:
    tokens, d_in, d_out, r = 8, 6, 10, 2
    net = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), LoraConfig(r=r, target_modules=["0"]))
    x = torch.randn(tokens, d_in)
    cost = step_cost(net, lambda: net(x).sum())
    assert cost.kept_activation_bytes == 4 * (tokens * d_in + tokens * r)
    base, down, up = 2 * tokens * d_in * d_out, 2 * tokens * d_in * r, 2 * tokens * r * d_out
    # Forward: three products. Backward: dA, dB, and the gradient of the rank-r product; nothing asks for that of x.
    assert cost.flops == base + down + up + down + up + up


def test_parameters_and_buffers_are_not_activations() -> None:
    norm = nn.BatchNorm1d(4)
    norm.eval()
    x = torch.randn(3, 4)
    assert step_cost(norm, lambda: norm(x).sum()).kept_activation_bytes == x.nbytes


def test_counting_leaves_no_trace() -> None:
    model = lora()
    model.train()
    model(**batch()).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = step_cost(model, lambda: model(**batch()).loss)
    second = step_cost(model, lambda: model(**batch()).loss)
    assert first == second
    assert isinstance(first, StepCost)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_counting_gives_gradients_back_when_the_loss_fails() -> None:
    net = nn.Linear(2, 1)
    net.weight.grad = mark = torch.ones(1, 2)

    def broken() -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        step_cost(net, broken)
    assert net.weight.grad is mark


def deberta_v3_base(kept: Sequence[str] = ()) -> nn.Module:
    """The real shape, LoRA of rank 8 on q, k and v; few words, since a frozen embedding keeps only indices."""
    with torch.device("cpu"), torch.random.fork_rng():
        model = DebertaV2ForSequenceClassification(
            DebertaV2Config(
                vocab_size=1000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                max_position_embeddings=512, type_vocab_size=0, relative_attention=True, position_buckets=256,
                norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
                pooler_hidden_size=768, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    settings = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=32, lora_dropout=0.05, target_modules=list(QKV["deberta"])
    )
    peft = get_peft_model(model, settings)
    peft.train()
    if kept:
        disconnect(peft, [a.name for a in adapters(peft) if f"{a.block}.{a.kind}" not in kept])
        assert len(adapters(peft)) == len(kept)
    return peft


LIVE = ("8.query_proj", "8.key_proj", "10.key_proj", "11.key_proj", "11.value_proj")


def test_deberta_v3_base_with_five_adapters() -> None:
    """Batch 8 x 128, float32, on real tensors: five in layers 8, 10 and 11. Everywhere: tests/ops/test_ops_cost.py."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(5, 1000, (8, 128), generator=generator),
        "attention_mask": torch.ones(8, 128, dtype=torch.long),
        "labels": torch.zeros(8, dtype=torch.long),
    }
    model = deberta_v3_base(LIVE)
    found = step_cost(model, lambda: model(**inputs).loss)
    assert found.kept_activation_bytes / 2**20 == pytest.approx(455, rel=0.01)
    assert found.flops / 1e9 == pytest.approx(280.3, rel=0.01)

"""Published placements against their formulas, each computed here in another way, on the base without adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.helpers import find_kappa_target_modules
from tests.builders import adapter_state, base, batch, lora, max_difference, trainer
from tests.methods.test_methods_battery import HELD_OUT, Loop
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

import weightlora as wl
from weightlora.core.published import proportional_ranks, scaled_ranks
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.selection import Selection
from weightlora.methods import (
    CKA,
    EVA,
    AdapterMethod,
    Aletheia,
    AttentionOutput,
    DomLoRA,
    FeedForward,
    GoRA,
    KappaTune,
    PLoP,
)
from weightlora.methods.placements.by_hand import part_of
from weightlora.training import fit

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LAYERS = 3
EVERY: list[AdapterMethod] = [
    DomLoRA(batches=2),
    PLoP(),
    CKA(),
    Aletheia(),
    KappaTune(),
    AttentionOutput(),
    FeedForward(),
    GoRA(),
    EVA(),
]


def model() -> PeftModel:
    return lora(layers=LAYERS, targets=TARGETS, dropout=0.0)


def started(method: Any) -> tuple[PeftModel, Selection]:
    """What a method that looks once has chosen, before any step."""
    loop = Loop.start(method, model())
    assert loop.tuner.selection is not None
    assert isinstance(loop.model, PeftModel)
    return loop.model, loop.tuner.selection


def scores(selection: Selection) -> list[float]:
    return [float(choice.score or 0.0) for choice in selection.choices]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return base("bert", LAYERS, dropout=0.0).eval()


@pytest.fixture(scope="module")
def linears(plain: PreTrainedModel) -> list[nn.Linear]:
    """The layers that have adapters in :func:`model`, in their order."""
    return [plain.get_submodule(adapter.name) for adapter in adapters(model())]  # type: ignore[misc]


@pytest.fixture(scope="module")
def weight_gradients(plain: PreTrainedModel, linears: list[nn.Linear]) -> list[list[Tensor]]:
    """dL/dW of every layer on every batch, by autograd."""
    found = []
    for inputs in HELD_OUT:
        plain.zero_grad()
        plain(**inputs).loss.backward()
        found.append([layer.weight.grad.clone() for layer in linears])  # type: ignore[union-attr]
    return found


def test_domlora_is_the_largest_sum_of_squared_gradients() -> None:
    still = model()
    loop = Loop.start(DomLoRA(batches=3), still, lr=0.0)
    expected = torch.zeros(len(adapters(still)), dtype=torch.float64)
    twin = model().train()
    for step in range(3):
        twin.zero_grad()
        twin(**batch(4, seed=1000 + step)).loss.backward()
        grads = [B.grad for _, B in parameters(twin, "default").values()]
        expected += torch.stack([g.double().square().sum() for g in grads if g is not None])
    selection = loop.run(4).tuner.finish()
    assert scores(selection) == pytest.approx(expected.tolist(), rel=1e-4)
    assert [c.name for c in selection.kept] == [adapters(twin)[int(expected.argmax())].name]
    assert DomLoRA.from_preset("paper").k == 1


def test_plop_is_the_paper_with_its_noise_drawn(plain: PreTrainedModel, linears: list[nn.Linear]) -> None:
    generator, found = torch.Generator().manual_seed(0), torch.zeros(len(linears))
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, args, _o, i=index: seen.update({i: args[0].detach().flatten(0, 1)}))
        for index, layer in enumerate(linears)
    ]
    for inputs in HELD_OUT:
        with torch.no_grad():
            plain(**inputs)
        for index, layer in enumerate(linears):
            z, W = seen[index], layer.weight.detach()
            noise = torch.randn(4000, z.shape[1], generator=generator)
            noise *= z.norm(dim=1).mean() / noise.square().sum(1).mean().sqrt()
            root_mean_square = (noise @ W.T).square().sum(1).mean().sqrt()
            found[index] += (z @ W.T).norm(dim=1).mean() / root_mean_square / len(HELD_OUT)
    for hook in hooks:
        hook.remove()
    changed, selection = started(PLoP(kinds=2))
    assert scores(selection) == pytest.approx((-found).tolist(), rel=0.03)
    kinds: dict[str, list[float]] = {a.role: [] for a in adapters(model())}
    for adapter, value in zip(adapters(model()), found, strict=True):
        kinds[adapter.role].append(float(value))
    best = sorted(kinds, key=lambda kind: sum(kinds[kind]))[:2]
    assert {a.role for a in adapters(changed)} == set(best)
    assert selection.k == 2 * LAYERS
    assert started(PLoP(kinds=99))[1].k == len(linears)


def test_cka_is_that_of_centred_gram_matrices(plain: PreTrainedModel) -> None:
    rows = [plain(**inputs, output_hidden_states=True).hidden_states for inputs in HELD_OUT]
    H = np.eye(8) - 1 / 8

    def gram(level: int) -> Any:
        X = torch.cat([hidden[level].mean(1) for hidden in rows]).detach().double().numpy()
        return H @ (X @ X.T) @ H

    def hsic(K: Any, L: Any) -> float:
        return float(np.trace(K @ L))

    cka = []
    for block in range(LAYERS):
        K, L = gram(block), gram(block + 1)
        cka.append(hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L)))
    changed, selection = started(CKA(blocks=1))
    assert [scores(selection)[6 * block] for block in range(LAYERS)] == pytest.approx([1 - c for c in cka], abs=1e-5)
    assert {a.block for a in adapters(changed)} == {int(np.argmin(cka))}


def test_cka_leaves_padding_out() -> None:
    rows = [{**inputs, "attention_mask": inputs["attention_mask"].clone()} for inputs in HELD_OUT]
    for inputs in rows:
        inputs["attention_mask"][:, 5:] = 0
    found = []
    for ids in (0, 1):  # other words where nobody looks
        padded = [{**inputs, "input_ids": inputs["input_ids"].clone()} for inputs in rows]
        for inputs in padded:
            inputs["input_ids"][:, 5:] = ids
        made = model()
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        selection = wl.attach(made, CKA(), optimizer, held_out=padded).selection
        assert selection is not None
        found.append(scores(selection))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_aletheia_adds_up_gradient_norms(weight_gradients: list[list[Tensor]]) -> None:
    of_block = [0.0] * LAYERS
    for batch_gradients in weight_gradients:
        for index, gradient in enumerate(batch_gradients):
            of_block[index // 6] += float(gradient.norm())
    changed, selection = started(Aletheia(blocks=0.7))
    assert scores(selection)[::6] == pytest.approx(of_block, rel=1e-4)
    assert {a.block for a in adapters(changed)} == set(np.argsort(of_block)[1:].tolist())
    assert all(p.grad is None for p in changed.parameters())


def test_kappatune_is_pefts_helper(plain: PreTrainedModel, linears: list[nn.Linear]) -> None:
    changed, selection = started(KappaTune(k=4))
    kappa = [float(np.linalg.cond(layer.weight.detach().double().numpy())) for layer in linears]
    assert scores(selection) == pytest.approx([1 / value for value in kappa], rel=1e-6)
    names = [adapter.name for adapter in adapters(model())]
    helper = find_kappa_target_modules(plain, top_p=1.0, show_progress=False)["target_modules"]
    assert helper is not None
    assert {a.name for a in adapters(changed)} == set([name for name in helper if name in names][:4])


def test_gora_follows_weights_times_mean_gradients(
    linears: list[nn.Linear], weight_gradients: list[list[Tensor]]
) -> None:
    mean = [torch.stack(of_layer).mean(0) for of_layer in zip(*weight_gradients, strict=True)]
    importance = [float((layer.weight.detach() * G).abs().mean()) for layer, G in zip(linears, mean, strict=True)]
    changed, selection = started(GoRA())
    assert scores(selection) == pytest.approx(importance, rel=1e-4)
    sizes = [layer.in_features + layer.out_features for layer in linears]
    b = sum(math.sqrt(size) * 4 for size in sizes)
    shares = [value / sum(importance) for value in importance]
    ranks = [min(max(round(b * s / math.sqrt(n)), 2), 16) for s, n in zip(shares, sizes, strict=True)]
    assert [a.rank for a in adapters(changed)] == ranks
    assert {a.scale for a in adapters(changed)} == {2.0}
    assert len(set(ranks)) > 2
    for A, B in parameters(changed, "default").values():
        assert bool((A.abs().sum(1) > 0).all())  # no rank is dead
        assert not B.any()


def test_eva_is_pefts_own() -> None:
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig()
    )
    stock = get_peft_model(base("bert", LAYERS, dropout=0.0), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        stock,
        HELD_OUT,
        prepare_model_inputs_fn=lambda inputs, _config: inputs["attention_mask"].nonzero(),
        show_progress_bar=False,
    )
    changed, selection = started(EVA())
    ours, theirs = parameters(changed, "default"), parameters(stock, "default")
    assert ours.keys() == theirs.keys()
    for name, (A, B) in ours.items():
        assert torch.equal(A, theirs[name][0])
        assert not B.any()
    assert sum(a.rank for a in adapters(changed)) == 4 * selection.n
    assert {a.scale for a in adapters(changed)} == {a.scale for a in adapters(stock)} == {2.0}
    assert len({a.rank for a in adapters(changed)}) > 1


def test_eva_removes_who_gets_no_direction() -> None:
    """One rank each, to be moved where most variance is."""
    made = lora(layers=LAYERS, targets=TARGETS, rank=1, dropout=0.0)
    live = adapters(made)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    selection = wl.attach(made, EVA(rho=4.0), optimizer, held_out=HELD_OUT).selection
    assert selection is not None
    assert all(choice.kept == bool(choice.score) for choice in selection.choices)
    assert sum(scores(selection)) == len(live)
    assert 0 < selection.k < len(live)


def test_ranks_within_a_budget() -> None:
    wide = [(16, 16), (16, 48)]
    assert proportional_ranks([1.0, 1.0], wide, [8, 8]) == [10, 7]
    assert proportional_ranks([1.0, 1.0], wide, [8, 8], params=700) == [9, 6]
    assert proportional_ranks([1.0, 0.0], [(8, 8), (8, 24)], [8, 8]) == [8, 4]  # all that the layer has
    shapes = [(8, 8), (8, 24)]
    with pytest.raises(ConfigError, match="too few for these adapters; use at least 192"):
        proportional_ranks([1.0, 1.0], shapes, [8, 8], params=100)
    with pytest.raises(ConfigError, match=r"adds up to 0\.0; there is nothing to follow"):
        proportional_ranks([0.0, 0.0], shapes, [8, 8])
    assert scaled_ranks([8, 0], shapes, 128) == [8, 0]
    assert scaled_ranks([9, 3], shapes, 128) == [4, 2]


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
PARTS = {  # how many layers of a block are the attention's output, and how many feed forward
    "bert": (1, 2), "deberta-v2": (1, 2), "distilbert": (1, 2), "modernbert": (1, 2), "t5": (3, 4), "bart": (3, 4),
    "gpt2": (1, 2), "gpt_neox": (1, 2), "opt": (1, 2), "bloom": (1, 2), "phi": (1, 2), "phi3": (1, 2), "llama": (1, 3),
    "gemma3_text": (1, 3), "qwen3": (1, 3),
}  # fmt: skip


@pytest.mark.parametrize("family", PARTS)
def test_parts_of_a_block_are_found_by_any_name(family: str) -> None:
    more = {"modernbert": {"pad_token_id": 0}, "phi3": {"pad_token_id": 0}, "t5": {"num_layers": 1, "d_model": 16}}
    sizes = {key: value for key, value in SIZES.items() if (family, key) != ("t5", "num_hidden_layers")}
    config = AutoConfig.for_model(family, **sizes, **more.get(family, {}))
    for name in ("encoder_layers", "decoder_layers", "n_layer", "n_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    with torch.device("meta"):
        found = AutoModel.from_config(config)
        wrapped = get_peft_model(found, LoraConfig(r=1, target_modules="all-linear", fan_in_fan_out=family == "gpt2"))
    parts = [part_of(adapter) for adapter in adapters(wrapped)]
    assert (parts.count("attention_output"), parts.count("feed_forward")) == PARTS[family], [
        (a.name, part_of(a)) for a in adapters(wrapped)
    ]


def test_placements_by_hand_keep_one_part_of_every_block() -> None:
    for method, roles in (
        (AttentionOutput(), {"attention.output.dense"}),
        (FeedForward(), {"intermediate.dense", "output.dense"}),
    ):
        changed, selection = started(method)
        assert {a.role for a in adapters(changed)} == roles
        assert selection.k == LAYERS * len(roles)
    with pytest.raises(ScheduleError, match="attention_output keeps the attention's output, and none has an adapter"):
        Loop.start(AttentionOutput())


@pytest.mark.parametrize("method", EVERY, ids=[method.name for method in EVERY])
def test_a_run_of_each_spends_its_budget(method: Any, tmp_path: Path) -> None:
    """Through the trainer; where ranks change, with a checkpoint on the way that leads to the same adapter."""
    shapes = [a.shape for a in adapters(model())]
    made, rank = method.within(3000, shapes, 4, [a.kind for a in adapters(model())])

    def run(resume: Any = False) -> Any:
        on = lora(layers=LAYERS, targets=TARGETS, dropout=0.0, rank=rank)
        each = trainer(tmp_path, on, steps=4, count=40, save_strategy="steps", save_steps=3)
        return fit(each, made, resume=resume, measure=False)

    whole = run()
    if isinstance(method, EVA | PLoP):
        again = run(tmp_path / "checkpoint-3")
        assert again.selection == whole.selection
        assert max_difference(adapter_state(again.model), adapter_state(whole.model)) == 0.0
    live = adapters(whole.model)
    spent = sum(a.rank * (a.d_in + a.d_out) for a in live)
    assert whole.adapter_params["effective"] == spent <= 3000
    if not isinstance(method, DomLoRA | KappaTune | EVA):
        assert spent >= 0.95 * 3000 or {a.rank for a in live} == {16}  # all that a layer has
    if not isinstance(method, DomLoRA):  # nobody trained before the first step
        assert whole.adapter_params["peak"] == spent
    assert all(not getattr(m, "lora_variant", None) for m in whole.model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in whole.model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PLoP(kinds=0), "kinds=0 is not allowed; use 1 or more"),
        (lambda: CKA(blocks=1.5), "blocks=1.5 is not allowed; use a count"),
        (lambda: EVA(rho=0.5), "rho=0.5 is not allowed; use 1"),
        (lambda: GoRA(batches=0), "batches=0 is not allowed"),
        (lambda: Aletheia(batches=0), "batches=0 is not allowed"),
        (
            lambda: Loop.start(Aletheia(blocks=4), model()),
            r"blocks=4 is more than the 3 that have adapters; use 1\.\.3",
        ),
        (lambda: Loop.start(CKA(), lora(layers=1)), "cka chooses among transformer blocks and the adapters lie in 1"),
        (lambda: Loop.start(KappaTune(k=99)), "k=99 asks for more adapters than the 6"),
        (lambda: Loop.start(EVA(rho=5.0)), "has 16 inputs, fewer than rho=5.0 times its rank 4"),
        (
            lambda: wl.attach(
                made := lora(),
                EVA(rho=4.0),
                torch.optim.SGD(made.parameters(), lr=0.1),
                held_out=[batch(1, seed=1)],
            ),
            "a batch has 8 tokens to look at, fewer than the 16 directions",
        ),
    ],
)
def test_what_cannot_be_is_said_early(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, ScheduleError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

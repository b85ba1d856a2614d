"""Adapter handles: order and fields on four architectures, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from tests.builders import ALL_LINEAR, FAMILIES, QKV, base, lora
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters, block_numbers, honours_variants, parameters

HOMES = {
    "bert": ("bert.encoder.layer.{}.attention.self.", ("query", "key", "value")),
    "deberta": ("deberta.encoder.layer.{}.attention.self.", ("query_proj", "key_proj", "value_proj")),
    "llama": ("model.layers.{}.self_attn.", ("q_proj", "k_proj", "v_proj")),
}


@pytest.mark.parametrize("family", sorted(HOMES))
def test_order_names_and_blocks(family: str) -> None:
    found = adapters(lora(family, 3))
    home, kinds = HOMES[family]
    expected = [(home.format(block) + kind, block, kind) for block, kind in itertools.product(range(3), kinds)]
    assert [(a.name, a.block, a.kind) for a in found] == expected
    assert [a.index for a in found] == list(range(9))


def test_order_in_an_encoder_decoder() -> None:
    found = adapters(lora("bart", 2))
    # A module's children come in the order in which BART defines them: k, v, q.
    homes = ["model.encoder.layers.{}.self_attn.", "model.decoder.layers.{}.self_attn."]
    expected = [homes[0].format(i) + k for i in range(2) for k in ("k_proj", "v_proj", "q_proj")]
    for i in range(2):
        for part in ("self_attn", "encoder_attn"):
            expected += [f"model.decoder.layers.{i}.{part}.{k}" for k in ("k_proj", "v_proj", "q_proj")]
    assert [a.name for a in found] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [QKV, ALL_LINEAR], ids=["qkv", "all-linear"])
def test_fields_are_those_of_the_layers(family: str, targets: dict[str, tuple[str, ...]]) -> None:
    chosen = targets[family]
    plain = base(family)
    if chosen is ALL_LINEAR[family]:
        chosen = tuple(sorted({n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and ".layer" in n}))
    model = lora(family, targets=chosen, rank=3, lora_alpha=12)
    found = adapters(model)
    linears = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    order = [n for n in linears if any(n == t or n.endswith("." + t) for t in chosen)]
    assert [a.name for a in found] == order
    for adapter, (name, (A, B)) in zip(found, parameters(model, "default").items(), strict=True):
        linear = linears[name]
        assert adapter.name == name
        assert (adapter.d_in, adapter.d_out) == adapter.shape == (linear.in_features, linear.out_features)
        assert (A.shape, B.shape) == ((3, adapter.d_in), (adapter.d_out, 3))
        assert (adapter.rank, adapter.scale) == (3, 4.0)


def test_llama_shapes_differ_within_a_block() -> None:
    shapes = {a.kind: a.shape for a in adapters(lora("llama"))}
    assert shapes == {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8)}


def test_order_does_not_depend_on_the_order_of_targets() -> None:
    names = [[a.name for a in adapters(lora(targets=t))] for t in itertools.permutations(QKV["bert"])]
    assert all(n == names[0] for n in names)


def test_patterns_and_rslora_show_in_rank_and_scale() -> None:
    found = adapters(lora(rank_pattern={"key": 2}, alpha_pattern={"value": 20}, use_rslora=True))
    by_kind = {a.kind: (a.rank, a.scale) for a in found}
    assert by_kind == {"query": (4, 8 / 4**0.5), "key": (2, 8 / 2**0.5), "value": (4, 20 / 4**0.5)}


def test_a_model_with_an_injected_adapter() -> None:
    model = base("bert")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    wrapped = get_peft_model(base("bert"), LoraConfig(r=2, target_modules=["query"]))
    assert adapters(model) == adapters(wrapped)
    assert len(adapters(model)) == 2


def test_a_plain_module_with_an_injected_adapter() -> None:
    net = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["1"]), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    )
    assert [(a.name, a.shape) for a in adapters(net)] == [("1", (3, 2))]


def test_several_adapters_are_told_apart_by_name() -> None:
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    assert [a.kind for a in adapters(model, "second")] == ["value", "value"]
    assert len(adapters(model)) == 6  # the first one is still the active one
    model.set_adapter("second")
    assert len(adapters(model)) == 2


def refused(model: nn.Module, message: str, name: str | None = None) -> None:
    with pytest.raises(AdapterError, match=message):
        adapters(model, name)


def test_refuses_a_model_without_adapters() -> None:
    refused(base("bert"), "BertForSequenceClassification has no LoRA adapters; wrap it first: peft.get_peft_model")


def test_refuses_an_unknown_name() -> None:
    refused(lora(), "adapter 'other' is unknown; the model has 'default'", "other")


def test_refuses_several_active_adapters() -> None:
    model = lora(task_type=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, r"the adapters \['default', 'second'\] are active; activate exactly one")


def test_refuses_dora() -> None:
    refused(lora(use_dora=True), "query uses the LoRA variant Dora.*, which cannot be gated; use plain LoRA")


def test_refuses_lora_bias() -> None:
    refused(lora(lora_bias=True), "query has lora_bias=True, which cannot be gated; set lora_bias=False")


def test_refuses_a_convolution() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 2))
    refused(get_peft_model(net, LoraConfig(r=2, target_modules=["0"])), "0 is a Conv1d; only linear layers")


@pytest.mark.parametrize("targets", [["0"], ["0", "1"]])
def test_refuses_an_embedding_alone_or_beside_others(targets: list[str]) -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    refused(get_peft_model(net, LoraConfig(r=2, target_modules=targets)), "0 is an embedding with LoRA; only linear la")


def test_refuses_a_layer_under_two_names() -> None:
    linear = nn.Linear(4, 4)
    net = get_peft_model(nn.Sequential(linear, nn.Tanh(), linear), LoraConfig(r=2, target_modules=["0"]))
    refused(net, "0 and 2 are the same layer under two names, which cannot have an adapter each; leave both out")
    net = nn.Sequential(
        get_peft_model(nn.Sequential(linear), LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    )
    net.append(net[0])
    net.peft_config = {"default": LoraConfig(r=2)}  # type: ignore[assignment]
    refused(net, "0 and 1 are the same layer under two names", "default")


def test_asks_a_layer_both_ways_whether_it_honours_variants() -> None:
    """Of today's releases by a method, of later ones by a property; a kind that says neither does not."""

    class Silent(nn.Module, LoraLayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    class Today(Silent):
        def resolve_lora_variant(self, **_: object) -> None:  # type: ignore[override]
            return None

    class Later(Silent):
        @property
        def lora_variants(self) -> dict[tuple[str, ...], type]:
            return {}

    found = [honours_variants(kind()) for kind in (Today, Later, Silent)]  # type: ignore[abstract]
    assert found == [True, True, False]


@pytest.mark.parametrize("make", ["bart", "t5"])
def test_blocks_of_two_stacks_are_different_blocks(make: str) -> None:
    if make == "bart":
        live = adapters(lora("bart", 2))
    else:
        sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
        net = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
        live = adapters(get_peft_model(net, LoraConfig(r=2, target_modules=["q", "v", "wo"])))
    of: dict[int | None, set[tuple[str, int | None]]] = {}
    for adapter, number in zip(live, block_numbers(live), strict=True):
        stack = "decoder" if "decoder" in adapter.name else "encoder"
        of.setdefault(number, set()).add((stack, adapter.block))
    assert list(of.values()) == [{("encoder", 0)}, {("encoder", 1)}, {("decoder", 0)}, {("decoder", 1)}]


def test_refuses_half_tied_factors_and_names_tied_ones() -> None:
    model = lora()
    first, second, *_ = parameters(model, "default")
    get = model.base_model.model.get_submodule
    get(second).lora_A["default"].weight = get(first).lora_A["default"].weight
    refused(model, f"{second} shares only one factor with another adapter; tie both or none")
    get(second).lora_B["default"].weight = get(first).lora_B["default"].weight
    assert [a.tied for a in adapters(model)] == [None, 0, None, None, None, None]


def test_a_left_over_gate_is_no_foreign_variant() -> None:
    from weightlora.graft.forms import Gates

    model = lora()
    gates = Gates(model)
    assert len(adapters(model)) == len(gates) == 6
    assert torch.equal(gates.omega, torch.ones(6))

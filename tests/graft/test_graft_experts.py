"""LoRA on fused experts, which PEFT puts on bare 3-D parameters: trained, selected, removed, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import VOCABULARY, adapter_state, logits, max_difference, trainer, warm
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from weightlora.cost import kept_bytes, trace
from weightlora.cost.operations import operations
from weightlora.errors import AdapterError, CheckpointError, ConfigError, ExportError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.fast import fast_path
from weightlora.graft.selection import Selection
from weightlora.graft.surgery import disconnect, grow_adapters, reshape
from weightlora.methods import LoRA, Method, OneShotGradient, RandomAdapters, WeightLoRA, WeightLoRAPlus, method
from weightlora.methods.policy import lora_params
from weightlora.training import fit
from weightlora.training.sharding import check_method

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip


def base() -> MixtralForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def mixture(**config: Any) -> PeftModel:
    """Adapters on the attention's q and v and on both parameters of the experts: eight, in two blocks."""
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "target_parameters": list(EXPERTS), **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **given))


def texts(count: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, VOCABULARY, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in texts(4)])}


def loss_of(model: nn.Module) -> Any:
    return lambda: model(**tokens(), labels=tokens()["input_ids"]).loss


def short(names: Any) -> list[str]:
    return [name.removeprefix("model.layers.") for name in names]


def test_each_parameter_is_an_adapter_in_the_order_of_computing() -> None:
    live = adapters(mixture())
    assert short(a.name for a in live[:4]) == [
        "0.self_attn.q_proj", "0.self_attn.v_proj", "0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj",
    ]  # fmt: skip
    assert [(a.shape, a.rank, a.experts, a.rows) for a in live[1:4]] == [
        ((16, 8), 2, None, 2), ((16, 64), 2, 4, 8), ((32, 16), 2, 4, 8),
    ]  # fmt: skip
    assert live[3].kind == "down_proj"
    trained = [p for n, p in mixture().named_parameters() if p.requires_grad]
    assert lora_params(live) == sum(p.numel() for p in trained)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT about its own rewriting
def test_modules_that_peft_rewrites_to_parameters_are_found_too() -> None:
    """Mixtral's experts were linear layers once, and PEFT still takes their old names."""
    live = adapters(mixture(target_modules=["q_proj", "w1", "w2", "w3"], target_parameters=None))
    assert short(a.name for a in live[:3]) == [
        "0.self_attn.q_proj", "0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"
    ]  # fmt: skip
    assert [a.rank for a in live[:3]] == [2, 4, 2]  # the two that were fused have a rank each


@pytest.mark.parametrize("gone", [(2,), (3,), (2, 3), (0, 2, 7), (0, 1, 4, 5)])
def test_disconnection_leaves_what_peft_builds_for_the_rest(gone: tuple[int, ...]) -> None:
    """Weights, names and nesting: the state dict of a model on which the rest alone was ever targeted."""
    model = warm(mixture())
    names = [a.name for a in adapters(model)]
    left = [name for index, name in enumerate(names) if index not in gone]
    disconnect(model, [names[index] for index in gone])
    assert [a.name for a in adapters(model)] == left
    own = mixture(
        target_modules=[n for n in left if "experts" not in n] or [],
        target_parameters=[n for n in left if "experts" in n] or None,
    )
    own.load_state_dict(model.state_dict())
    assert torch.equal(logits(own, tokens()), logits(model, tokens()))
    saved, fresh = (m.peft_config["default"] for m in (model, own))
    assert set(saved.target_modules) == set(fresh.target_modules)
    assert set(saved.target_parameters or ()) == set(fresh.target_parameters or ())


def test_what_is_written_opens_elsewhere(tmp_path: Path) -> None:
    """(Parity, resume and exports of every mixture: ``tests/test_families.py``.)"""
    made = trainer(tmp_path, mixture(), data=texts(), steps=6)
    result = fit(made, WeightLoRA(k=5, select_after=3))
    assert result.selection is not None
    bare = [c.name for c in result.selection.kept if c.experts is not None]
    assert bare
    assert [a.name for a in adapters(made.model)] == list(result.selection.names)
    for phase in result.phases:
        assert result.predicted[phase.name]["trainable_params"] == phase.trainable_params
    done = export(result, tmp_path / "native")
    written = json.loads((done.path / "adapter_config.json").read_text())
    assert written["target_parameters"] == bare
    again = PeftModel.from_pretrained(base(), str(done.path))
    assert float((logits(again, tokens()) - logits(made.model, tokens())).abs().max()) < 1e-5
    merged = export(result, tmp_path / "merged", "merged")
    opened = MixtralForCausalLM.from_pretrained(merged.path)
    assert float((logits(opened, tokens()) - logits(made.model, tokens())).abs().max()) < 1e-4
    for profile in ("portable", "dense", "gguf"):
        with pytest.raises(ExportError, match=rf"'{profile}' cannot hold {len(bare)} adapters on bare parameters \(mo"):
            export(result, tmp_path / profile, profile)
    elsewhere = get_peft_model(base(), result.selection.lora_config())
    assert [a.name for a in adapters(elsewhere)] == list(result.selection.names)


def test_what_is_kept_is_foretold_for_every_placement() -> None:
    """The whole weight that PEFT makes is kept while its adapter lives, and only then."""
    n = 8
    foretold = trace(model := mixture(), loss_of(model))
    for live in [(i,) for i in range(n)] + [(1, 2), (3, 6)]:
        left = mixture()
        fast_path(left)
        disconnect(left, [a.name for a in adapters(left) if a.index not in live])
        assert foretold.kept(live) == kept_bytes(left, loss_of(left)), live
    assert foretold.deepest(2) == (6, 7)


def test_a_budget_of_memory_chooses_among_experts(tmp_path: Path) -> None:
    made = trainer(tmp_path, mixture(), data=texts(), steps=6)
    result = fit(made, WeightLoRA(memory=270_000, select_after=3))
    assert result.selection is not None
    assert result.selection.placement is not None
    assert 0 < result.selection.k < result.selection.n
    kept = {phase.name: phase.kept_activation_bytes for phase in result.phases}
    assert (kept["final"] or 0) < result.selection.placement["total"] <= 270_000


@pytest.mark.parametrize(
    "chosen",
    [
        OneShotGradient(k=3, batches=3),
        method("top", k=3),
        *(WeightLoRA(k=3, select_after=3, score=score) for score in ("cross-gradient", "trapezoid")),
    ],
)
def test_methods_that_only_remove(chosen: Method, tmp_path: Path) -> None:
    made = trainer(tmp_path, mixture(), data=texts(), steps=6)
    result = fit(made, chosen, measure=False)
    assert result.selection is not None
    assert result.selection.k == len(adapters(made.model)) == 3


@pytest.mark.parametrize(
    ("chosen", "what"),
    [
        (WeightLoRAPlus(k=3, select_after=3), "weightlora+ grows survivors"),
        (WeightLoRA(preset="paper", k=3, select_after=3), "weightlora gates adapters"),
        (WeightLoRA(k=3, select_after=3, score="integrated"), "weightlora gates adapters"),
        (method("increlora"), "increlora makes what computes of A and B in a form of its own"),
        (method("lora_drop"), "lora_drop looks at the layers' inputs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(chosen: Method, what: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, mixture(), data=texts(), steps=30)
    before = adapter_state(made.model)
    name = r"model\.layers\.0\.mlp\.experts\.gate_up_proj, a bare parameter \(experts, a router\)"
    with pytest.raises(AdapterError, match=f"^{what.replace('+', '[+]')}, which cannot be done to {name}"):
        fit(made, chosen, measure=False)
    assert max_difference(before, adapter_state(made.model)) == 0.0
    assert not list(tmp_path.iterdir())


def test_ranks_operations_and_sharding_are_refused(tmp_path: Path) -> None:
    model = mixture()
    live = adapters(model)
    with pytest.raises(AdapterError, match=r"gate_up_proj is a bare parameter .* rank of its adapter cannot change"):
        grow_adapters(model, {live[2].name: 3}, generator=torch.Generator())
    with pytest.raises(AdapterError, match="rank of its adapter cannot change"):
        reshape(model, LoRA().keep_all([replace(live[2], index=0, rank=3)], "of another rank"))
    with pytest.raises(ScheduleError, match=r"cannot be counted: PEFT adds the adapter of .* to the whole weight"):
        operations(model := mixture(), loss_of(model))
    chosen = RandomAdapters(k=2)
    with pytest.raises(ConfigError, match="to whole weights, which FSDP shards; run without FSDP"):
        check_method(chosen, chosen.begin(live, 5))


def test_a_router_may_have_an_adapter_too(tmp_path: Path) -> None:
    """A bare parameter of two dimensions is one matrix, in the layout of a linear layer."""
    model = mixture(target_parameters=["gate.weight"])
    live = adapters(model)
    assert [(a.name, a.shape, a.rank, a.experts) for a in live if a.experts] == [
        (f"model.layers.{i}.mlp.gate.weight", (16, 4), 2, 1) for i in range(2)
    ]
    made = trainer(tmp_path, model, data=texts(), steps=4)
    result = fit(made, WeightLoRA(k=1.0, select_after=2), measure=False)
    for profile in ("native", "merged"):
        assert export(result, tmp_path / profile, profile).max_difference < 1e-4


def test_quantised_experts_are_refused() -> None:
    held = nn.Module()
    held.register_parameter("packed", nn.Parameter(torch.zeros(2, 4, 3, dtype=torch.uint8), requires_grad=False))
    model = get_peft_model(nn.Sequential(held), LoraConfig(r=1, target_modules=[], target_parameters=["0.packed"]))
    with pytest.raises(AdapterError, match=r"0\.packed is quantised, and PEFT adapts bare parameters"):
        adapters(model)


def test_selections_say_which_are_experts() -> None:
    live = adapters(mixture())
    chosen = RandomAdapters(k=3)
    said = chosen.choose(live, [2, 3, 4], "by hand", step=0)
    assert Selection.from_json(said.to_json()) == said
    assert short(said.lora_config().target_modules) == ["1.self_attn.q_proj"]
    old = said.to_dict()
    old["choices"][0]["experts"] = 0
    with pytest.raises(CheckpointError, match="experts must be 1 or more"):
        Selection.from_dict(old)

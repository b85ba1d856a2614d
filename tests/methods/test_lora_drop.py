"""LoRA-drop against brute force: dense outputs, sorted shares, shared storage, summed gradients."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import QKV, batch, batches, examples, logits, lora, trainer, warm
from tests.methods.test_methods_battery import HELD_OUT, STEPS, Loop
from torch import nn

import weightlora as wl
from weightlora.core.importance import smallest_prefix
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters
from weightlora.graft.watch import output_energy
from weightlora.methods import LoRADrop, Method
from weightlora.training import attach
from weightlora.training.held_out import HeldOutBatches, hold_out, stratified


def rough(made: Method, until: int = STEPS) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """bf16 adapters, two backward passes a step, through every event of the method."""
    model = lora().to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=True)
    tuner = attach(model, made, optimizer, max_steps=STEPS, held_out=HELD_OUT)
    stream = batches()
    for _ in range(until):
        for _ in range(2):
            (model(**next(stream)).loss / 2).backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    return model, optimizer, tuner


def everything(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def dense_energy(model: nn.Module, inputs: Any) -> dict[str, float]:
    """``||dW x||^2`` with the dense update in float64 on the inputs that the layers really get."""
    found: dict[str, float] = {}
    named = {a.name: a for a in adapters(model)}
    handles = []
    for path, module in model.base_model.model.named_modules():
        if path in named:

            def hook(layer: Any, args: Any, _out: Any, path: str = path) -> None:
                delta = layer.get_delta_weight("default").double()
                found[path] = float((args[0].double() @ delta.T).square().sum())

            handles.append(module.register_forward_hook(hook))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def test_output_energy_is_that_of_the_dense_update() -> None:
    model = warm(lora()).train()
    held_out, state = HeldOutBatches(model, HELD_OUT), torch.get_rng_state()
    got = held_out.watch(0, output_energy)
    want = dense_energy(model, HELD_OUT[0])
    torch.testing.assert_close(got, torch.tensor([want[a.name] for a in adapters(model)], dtype=torch.float64),
                               rtol=1e-5, atol=0.0)  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@given(
    st.lists(st.integers(0, 50).map(float), min_size=1, max_size=8),
    st.sampled_from([1e-9, 0.125, 0.5, 0.75, 1.0]),
)
def test_smallest_prefix_against_all_sizes(scores: list[float], threshold: float) -> None:
    chosen = smallest_prefix(scores, threshold)
    best = sorted(scores, reverse=True)
    size = next(k for k in range(len(scores) + 1) if sum(best[:k]) >= threshold * sum(scores))
    assert len(chosen) == size
    assert sorted((scores[i] for i in chosen), reverse=True) == best[:size]
    if threshold == 1.0:
        assert chosen == [i for i, score in enumerate(scores) if score > 0]
    if threshold == 1e-9 and any(scores):
        assert chosen == [scores.index(max(scores))]


@pytest.mark.parametrize("bad", [[1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_prefix_refuses_what_is_no_energy(bad: list[float]) -> None:
    with pytest.raises(ConfigError, match="negative or not finite"):
        smallest_prefix(bad, 0.9)


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_threshold_is_checked(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold=.* is not allowed; use a share above 0"):
        LoRADrop(threshold=threshold)
    with pytest.raises(ConfigError, match="batches=0 is not allowed"):
        LoRADrop(batches=0)


@pytest.mark.parametrize("threshold", [1e-6, 0.7, 1.0])
def test_own_and_shared_pairs(threshold: float) -> None:
    """Against the dense energies at the seam, kind by kind, in 3 blocks with 2 shapes of modules."""
    model = lora(layers=3, targets=[*QKV["bert"], "intermediate.dense"])
    loop = Loop.start(LoRADrop(threshold=threshold, select_after=4), model).run(3)
    want: dict[str, float] = {}
    operate = loop.tuner._driver.operate

    def measured(optimizer: Any) -> Any:
        for inputs in HELD_OUT:
            for name, energy in dense_energy(model, inputs).items():
                want[name] = want.get(name, 0.0) + energy
        return operate(optimizer)

    loop.tuner._driver.operate = measured  # type: ignore[method-assign]  # looks, and goes on
    loop.run(4)
    selection = loop.tuner.selection
    assert selection is not None
    live = adapters(model)
    expected = 0
    for kind in {a.kind for a in live}:
        members = [a for a in live if a.kind == kind]
        total = sum(want[a.name] for a in members)
        scores = {c.name: c.score for c in selection.choices}
        shares = [scores[a.name] for a in members]
        assert shares == pytest.approx([want[a.name] / total for a in members], rel=1e-4)
        assert sum(shares) == pytest.approx(1.0)
        own = {members[i].name for i in smallest_prefix(shares, threshold)}
        users = [a for a in members if a.name not in own]
        assert len({a.tied if a.tied is not None else a.index for a in users}) == min(1, len(users))
        assert all(a.tied is None for a in members if a.name in own)
        expected += (len(own) + min(1, len(users))) * members[0].rank * sum(members[0].shape)
    assert loop.tuner._driver.policy.setup.count(live) == expected
    trained = {id(p): p.numel() for n, p in model.named_parameters() if "lora_" in n}
    assert sum(trained.values()) == expected
    held = everything(loop.optimizer)
    assert len(held) == len(set(held))
    assert set(trained) <= set(held)
    if threshold == 1.0:
        assert selection.groups == ()
    if threshold == 1e-6:
        assert [len(group) for group in selection.groups] == [2, 2, 2, 2]


def test_starts_again_from_the_base_model_with_no_moments() -> None:
    loop = Loop.start(LoRADrop(threshold=1e-6, select_after=4)).run(4)
    model = loop.model
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert all(bool((p == 0).all()) for n, p in factors.items() if "lora_B" in n)
    assert all(0 < float(p.detach().abs().max()) <= p.shape[1] ** -0.5 for n, p in factors.items() if "lora_A" in n)
    assert not any(p in loop.optimizer.state for p in factors.values())  # no moments of the first stage


def test_gradient_of_a_shared_pair_is_the_sum_over_its_users() -> None:
    model = lora(layers=3, dropout=0.0)
    loop = Loop.start(LoRADrop(threshold=1e-6, select_after=4), model).run(7)
    selection = loop.tuner.finish()
    assert len(selection.groups) == 3
    layers = dict(model.base_model.model.named_modules())
    model(**batch()).loss.backward()
    grads = {g: layers[g[0]].lora_A["default"].weight.grad.clone() for g in selection.groups}
    for group in selection.groups:  # untie: every user gets a copy of its own
        for name in group[1:]:
            for part in (layers[name].lora_A, layers[name].lora_B):
                part["default"].weight = nn.Parameter(part["default"].weight.detach().clone())
    model.zero_grad()
    model(**batch()).loss.backward()
    for group, grad in grads.items():
        apart = [layers[name].lora_A["default"].weight.grad for name in group]
        assert all(float(part.abs().max()) > 0 for part in apart)
        torch.testing.assert_close(sum(apart), grad)


def test_bf16_and_accumulation_through_the_seam() -> None:
    model, optimizer, tuner = rough(LoRADrop(select_after=4, threshold=0.5))
    assert tuner.finish().k == 6
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert len(everything(optimizer)) == len(set(everything(optimizer)))


def test_fit_and_export(tmp_path: Path) -> None:
    each = trainer(tmp_path / "run", lora(layers=3), steps=8, count=40)
    result = wl.fit(each, LoRADrop(select_after=3, threshold=0.3, batches=2))
    assert result.selection is not None
    assert result.selection.groups
    done = wl.export(result, tmp_path / "out")
    assert done.max_difference <= 1e-5


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.data())
def test_every_class_gives_its_share(classes: list[int], data: st.DataObject) -> None:
    held = data.draw(st.integers(1, len(classes)))
    order = data.draw(st.permutations(range(len(classes))))
    taken = stratified(order, classes, held)
    assert len(set(taken)) == len(taken) == held
    for label, count in Counter(classes).items():
        share = held * count / len(classes)
        assert abs(sum(classes[row] == label for row in taken) - share) < 1
    for label in set(classes):  # drawn at random within a class: from all over it, not from its front
        members = [row for row in order if classes[row] == label]
        whole = stratified(members, classes, len(members))
        assert whole == members


@pytest.mark.parametrize("rows", ["list", "dataset", "tensors"])
def test_the_sample_is_stratified(tmp_path: Path, rows: str) -> None:
    """40 of 200 rows, from classes of 150, 40 and 10."""
    plain = [{**row, "labels": 0 if i < 150 else 1 if i < 190 else 2} for i, row in enumerate(examples(200))]
    data: Any = plain
    if rows == "dataset":
        data = Dataset.from_list([{**{k: v.tolist() for k, v in row.items() if k != "labels"}, "label": row["labels"]}
                                  for row in plain])  # fmt: skip
    elif rows == "tensors":
        data = [{**row, "labels": torch.tensor(row["labels"])} for row in plain]
    for seed in (0, 1):
        each = trainer(tmp_path, data=data, per_device_eval_batch_size=10, seed=seed)
        sample = hold_out(each, 4)
        assert sample is not None
        labels = [int(label) for inputs in sample.batches for label in inputs["labels"]]
        assert Counter(labels) == {0: 30, 1: 8, 2: 2}
        rest = [each.train_dataset[i] for i in range(len(each.train_dataset))]
        assert Counter(int(row.get("labels", row.get("label"))) for row in rest) == {0: 120, 1: 32, 2: 8}
        ids = [tuple(ids.tolist()) for inputs in sample.batches for ids in inputs["input_ids"]]
        assert not {tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in rest} & set(ids)
        assert sorted(ids) != sorted(tuple(row["input_ids"].tolist()) for row in plain[:40])


def test_rows_without_classes_are_drawn_too(tmp_path: Path) -> None:
    for label in (0.5, [1, 2], None):
        data = [{**row, "labels": label} for row in examples(20)]
        data = data if label is not None else [{k: v for k, v in row.items() if k != "labels"} for row in data]
        each = trainer(tmp_path, data=data, per_device_eval_batch_size=2)
        sample = hold_out(each, 1)
        assert sample is not None
        assert (len(sample), len(each.train_dataset)) == (1, 18)


def test_outputs_that_say_nothing_are_refused() -> None:
    model = lora()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tuner = attach(model, LoRADrop(select_after=1), optimizer, max_steps=3, held_out=HELD_OUT)
    model(**batch()).loss.backward()
    optimizer.step()
    with pytest.raises(ScheduleError, match="outputs are all zero or not finite after 1 steps"):
        tuner.step()
    with pytest.raises(ScheduleError, match="lora_drop needs batches that the run does not train on"):
        attach(model, LoRADrop(select_after=1), optimizer, max_steps=3)

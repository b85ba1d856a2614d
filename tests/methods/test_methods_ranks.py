"""What methods that score and move ranks must do: gradients, parity where nothing moves, and no trace of what fell.

Which point of the common battery is tested where (every method is meant, unless a file is named):

- starts at dW = 0, exact k, determinism, state in mid-schedule, bfloat16, accumulation: test_methods_battery.py
- parameter formula, Trainer resume, optimizer at the end, export: test_methods_runs.py
- killed processes: tests/runs/test_runs_killed.py
- budget after each event: the methods' own files (adalora, dynamic_lora, increlora, alora, flexlora, lora_drop,
  flexora), test_methods_scores.py (weightlora, weightlora+)
- finite differences: here; omega in tests/graft/test_graft_gates.py, ALoRA and Flexora in their own files
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from tests.builders import QKV, base, batch, batches, lora, warm
from tests.methods.test_methods_battery import HERE, RANKED, STEPS, Loop, build, ended
from tests.runs.killer import Killer
from torch import Tensor, nn

from weightlora.graft.adapters import adapters, lora_layers
from weightlora.methods import AdaLoRA, DynamicLoRA, IncreLoRA, Method, OneShotGradient, WeightLoRA
from weightlora.training import Tuner, attach

WATCHED = 3  # the adapter whose score is checked entry by entry


def numeric(model: nn.Module, tensor: Tensor) -> Tensor:
    """dL/dtensor by central differences in float64, entry by entry."""
    assert tensor.dtype == torch.float64
    flat, found = tensor.detach().view(-1), torch.zeros(tensor.numel(), dtype=torch.float64)
    with torch.no_grad():
        for entry in range(flat.numel()):
            start = float(flat[entry])
            losses = []
            for point in (start + 1e-6, start - 1e-6):
                flat[entry] = point
                losses.append(float(model(**batch()).loss))
            flat[entry] = start
            found[entry] = (losses[0] - losses[1]) / 2e-6
    return found.view(tensor.shape)


SCORED: dict[str, Method] = {
    "weightlora": WeightLoRA(k=2, select_after=5, score="credit", gate_lr=0.0),
    "gradient": OneShotGradient(k=2, batches=5),
    "adalora": AdaLoRA(tinit=3, tfinal=3, deltaT=1, orth_reg_weight=0.0),
    "increlora": IncreLoRA(init_warmup=1, incre_interval=2, top_h=3, orth_reg_weight=0.0),
}


@pytest.mark.parametrize("name", SCORED)
def test_a_score_by_finite_differences(name: str) -> None:
    """One step of SGD; the statistic that the policy took from it, against one from differences of the loss."""
    model = lora(dropout=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tuner = attach(model, SCORED[name], optimizer, max_steps=STEPS, engine="reference")
    model.double().train()
    policy: Any = tuner._driver.policy
    if name != "gradient":  # it looks at B = 0
        warm(model)
    form: Any = tuner._driver.formed and tuner._driver.formed.form
    if form is not None:
        with torch.no_grad():
            form.values.add_(torch.linspace(0.2, 0.7, form.values.numel(), dtype=torch.float64) * form.open)
    A, B = tuner._driver._factors[WATCHED]
    base_weight = list(lora_layers(model, "default"))[WATCHED][1].get_base_layer().weight
    wanted = [numeric(model, factor) for factor in (A, B)]
    dense = 2.0 * (B * form.of(WATCHED).detach()) @ A if name == "increlora" else torch.zeros(0)
    product = float((dense.detach() * numeric(model, base_weight)).abs().sum()) if name == "increlora" else 0.0
    gates = numeric(model, form.values) if name == "adalora" else None
    before = [factor.detach().clone() for factor in (A, B)]
    model(**batch()).loss.backward()
    for factor, want in zip((A, B), wanted, strict=True):
        torch.testing.assert_close(factor.grad, want, rtol=1e-6, atol=1e-8)
    optimizer.step()
    tuner.step()
    if name == "weightlora":
        moved = [factor.detach() - old for factor, old in zip((A, B), before, strict=True)]
        gain = -sum(float((g * d).sum()) for g, d in zip(wanted, moved, strict=True))
        assert gain > 0
        assert float(policy.worth.credits[WATCHED]) == pytest.approx(gain, rel=1e-6)
    elif name == "gradient":
        torch.testing.assert_close(policy.worth.sums[WATCHED].double(), wanted[1], rtol=1e-5, atol=1e-7)
    elif name == "increlora":
        assert float(policy.stats[0, WATCHED]) == pytest.approx(0.15 * product / base_weight.numel() ** 0.5, rel=1e-6)
    else:
        for (mean, _), value, grad in zip(
            (policy.stats[0], policy.stats[1 + 2 * WATCHED], policy.stats[2 + 2 * WATCHED]),
            (form.values, A, B), (gates, *wanted), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mean.double(), 0.15 * (value.detach() * grad).abs(), rtol=1e-5, atol=1e-7)


NOTHING: dict[str, tuple[Method, int, float]] = {  # a budget that takes and gives nothing; rank, PEFT's alpha
    "adalora": (AdaLoRA(init_r=4, orth_reg_weight=0.0, shrink=False), 4, 8.0),
    "dynamic_lora": (DynamicLoRA(init_r=4, dem_weight=0.0, shrink=False), 4, 2.0 * (4 + 1e-5)),  # it divides by r alone
    "increlora": (IncreLoRA(orth_reg_weight=0.0, shrink=False), 1, 2.0),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_schedule_that_changes_nothing_is_plain_training(name: str) -> None:
    """``s B diag(E) A`` under AdamW in float64, against PEFT's own layer of that form left to itself."""
    made, rank, alpha = NOTHING[name]
    ours = lora(rank=rank, dropout=0.0)
    groups: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], **groups)
    tuner = attach(ours, made, optimizer, max_steps=30, engine="reference")
    form: Any = tuner._driver.formed and tuner._driver.formed.form
    ours.double().train()
    if name == "increlora":
        form.factor = form.factor.double()
        tuner._driver.policy.pool.arrange(form)  # type: ignore[attr-defined]  # again, unrounded
    config = AdaLoraConfig(task_type="SEQ_CLS", init_r=rank, target_r=rank, total_step=30, lora_alpha=alpha,  # type: ignore[arg-type]
                           target_modules=list(QKV["bert"]))  # fmt: skip
    theirs = get_peft_model(base("bert", dropout=0.0), config).double().train()
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                value.copy_(mine[f"{key}.weight"])
            elif "lora_E" in key:
                value.zero_()
            elif "modules_to_save" in key:
                value.copy_(mine[key])
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **groups)
    for _, inputs in zip(range(12), batches(), strict=False):
        ours(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        theirs.base_model.model(**inputs).loss.backward()  # without the regulariser that PEFT's wrapper adds
        other.step()
        other.zero_grad()
    E = torch.cat([p.detach().flatten() for key, p in theirs.named_parameters() if "lora_E" in key])
    assert float(E.abs().min()) > 1e-3
    torch.testing.assert_close(form.values.detach(), E, rtol=1e-8, atol=1e-10)
    for key, value in theirs.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            torch.testing.assert_close(mine[f"{key}.weight"], value, rtol=1e-8, atol=1e-10)


GATED = [(name, preset) for name in sorted(RANKED) for preset in ("recommended", "paper")]


def empty(tuner: Tuner, index: int) -> None:
    """A hand on the scale: from now on every event takes all ranks of one adapter away."""
    policy: Any = tuner._driver.policy
    decided = policy.observe

    def observe(view: Any) -> Any:
        fresh = decided(view)
        gates = view.ranks
        gates.set(torch.where(gates.owner == index, 0.0, gates.values.detach()))
        holder = vars(policy).get("pool", policy)
        for name in ("mask", "alive"):
            if name in vars(holder):
                setattr(holder, name, getattr(holder, name) & (gates.owner != index))
        return fresh

    policy.observe = observe


@pytest.mark.parametrize(("name", "preset"), GATED, ids=["-".join(case) for case in GATED])
def test_an_adapter_that_lost_all_its_ranks_is_gone(name: str, preset: str) -> None:
    """Its layer is the base layer again: no parameter, no gradient, no optimizer state, no kernel of an adapter."""
    loop = Loop.start(build(name, preset))
    lost = adapters(loop.model)[4].name
    factors = loop.tuner._driver._factors[4]
    empty(loop.tuner, 4)
    loop.run(STEPS)
    selection = loop.tuner.finish()
    assert [c.kept for c in selection.choices] == [True] * 4 + [False, True]
    assert lost not in selection.names
    layer = loop.model.base_model.model.get_submodule(lost)
    assert type(layer) is nn.Linear
    assert not [n for n, _ in loop.model.named_parameters() if lost in n and "lora" in n]
    assert not layer.weight.requires_grad
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in factors}
    assert not any(p in loop.optimizer.state for p in factors)
    assert held == {id(p) for p in loop.model.parameters() if p.requires_grad}
    loop.optimizer.zero_grad()
    loop.model(**batch()).loss.backward()
    assert layer.weight.grad is None
    assert sum(a.rank for a in adapters(loop.model)) == sum(c.rank for c in selection.kept)


def what_became_of_all() -> str:
    """Every method's selection and the names of what it trained."""
    runs = [ended(name, "recommended") for name in HERE]
    return "\n".join(f"{run.selection.to_json()} {[n for n, _ in run.loop.model.named_parameters()]}" for run in runs)


@pytest.mark.slow
def test_nothing_depends_on_the_order_of_sets_and_dicts(killer: Killer) -> None:
    """Every method here, and in a process that hashes text differently."""
    elsewhere = killer.call("tests.methods.test_methods_ranks:what_became_of_all")
    assert elsewhere["hash"] != hash("text")
    assert elsewhere["said"] == what_became_of_all()
    assert elsewhere["said"].count('"kept"') > 50

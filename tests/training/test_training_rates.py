"""Two learning rates, the head's and the adapters': against stock trainers with groups made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, base, lora, max_difference, trainer
from transformers import Trainer

import weightlora as wl
from weightlora.errors import AdapterError, ConfigError
from weightlora.training import fit

RATE = 1e-2
MADE: dict[str, wl.Method] = {
    "weightlora": wl.WeightLoRA(k=2, select_after=4, adapter_rate=3.0, b_rate=4.0),
    "weightlora+": wl.WeightLoRAPlus(k=2, select_after=4, adapter_rate=3.0),
    "adalora": wl.AdaLoRA(tinit=2, tfinal=4, deltaT=1),
    "increlora": wl.IncreLoRA(init_warmup=1, incre_interval=1, top_h=3, adapter_rate=3.0),
    "flexlora": wl.FlexLoRA(clients=2, rounds=2),
}


def peaks(each: Trainer) -> dict[str, float]:
    """Every trained parameter's learning rate at the peak of the schedule."""
    model: Any = each.model
    names = {p: n for n, p in model.named_parameters()}
    groups: Any = each.optimizer.param_groups  # type: ignore[union-attr]
    return {names[p]: group["initial_lr"] for group in groups for p in group["params"] if p in names}


def test_a_run_is_the_stock_trainers_with_groups_made_by_hand(tmp_path: Path) -> None:
    """LoRA+ beside a slow head: 3 for A, 12 for B, 1 for the head."""
    plain = trainer(tmp_path / "a", lora())
    named = [(n, p) for n, p in plain.model.named_parameters() if p.requires_grad]
    decayed = set(plain.get_decay_parameter_names(plain.model))
    plain.optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": 0.01 * (n in decayed),
                "lr": RATE * (12 if "lora_B" in n else 3 if "lora_A" in n else 1),
            }
            for n, p in named
            for factor in [12 if "lora_B" in n else 3 if "lora_A" in n else 1]
        ]
    )
    plain.train()
    ours = trainer(tmp_path / "b", lora(), optim="adamw_torch")
    fit(ours, wl.LoRA(adapter_rate=3.0, b_rate=4.0), engine="stock")
    assert max_difference(dict(plain.model.state_dict()), dict(ours.model.state_dict())) == 0.0


@pytest.mark.parametrize("name", MADE)
def test_rates_hold_through_the_seam_and_a_resume(name: str, tmp_path: Path) -> None:
    made = MADE[name]
    factor = 3.0  # given, or the method's own
    whole = trainer(tmp_path, lora(), steps=8, save_strategy="steps", save_steps=2)
    fit(whole, made, measure=False)
    for parameter, rate in peaks(whole).items():
        b = made.b_rate if "lora_B" in parameter else 1.0
        assert rate == pytest.approx(RATE * (factor * b if "lora_" in parameter else 1.0)), parameter
    for cut in (2, 6):
        again = trainer(tmp_path, lora(), steps=8, save_strategy="no")
        fit(again, made, measure=False, resume=tmp_path / f"checkpoint-{cut}")
        assert peaks(again) == peaks(whole)
        assert max_difference(adapter_state(again.model), adapter_state(whole.model)) == 0.0


def test_a_preset_of_a_papers_has_one_rate() -> None:
    for preset in ("paper", "official"):
        assert wl.method("adalora", preset).rate_of("x.lora_A.default.weight") == 1.0
    assert wl.AdaLoRA().rate_of("x.lora_A.default.weight") == 3.0
    assert wl.AdaLoRA(adapter_rate=0.5).rate_of("form_rank_gates") == 0.5
    assert wl.VeRA().rate_of("x.vera_lambda_b.default") == 10.0
    assert wl.VBLoRA(adapter_rate=1.0).rate_of("x.vblora_logits_A.default") == 10.0
    assert wl.AdaLoRA().rate_of("transform_layer.weight") == 1.0
    with pytest.raises(ConfigError, match=r"adapter_rate=0 is not allowed; use a multiple above 0"):
        wl.LoRA(adapter_rate=0)
    with pytest.raises(ConfigError, match="full has no setting 'adapter_rate'"):
        wl.methods.FullFineTuning(adapter_rate=3.0)


def test_a_head_alone_is_the_stock_trainer_on_a_frozen_base(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", base("bert"))
    model: Any = plain.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    plain.train()
    ours = trainer(tmp_path / "b", base("bert"))
    result = fit(ours, wl.HeadOnly())
    states = dict(model.state_dict()), dict(ours.model.state_dict())
    assert max_difference(*states) == 0.0
    start = dict(base("bert").state_dict())
    assert {name for name in start if not torch.equal(start[name], states[1][name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert result.phases[-1].trainable_params == 2 * 16 + 2


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    each = trainer(tmp_path, lora())
    with pytest.raises(AdapterError, match="trains the plain model"):
        fit(each, wl.HeadOnly())
    each.model = base("bert").base_model
    with pytest.raises(AdapterError, match="has no new head to train"):
        fit(each, wl.HeadOnly())

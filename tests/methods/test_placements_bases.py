"""Published placements on experts and on quantised bases: what they read there, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.builders import base, batch
from tests.graft.test_graft_experts import mixture
from tests.graft.test_graft_quantised import Codes
from tests.methods.test_methods_battery import HELD_OUT
from tests.training.test_training_quantised import GPTQMODEL, gptq_layers_are, quantised

import weightlora as wl
from weightlora.errors import AdapterError
from weightlora.graft.quantised import whole_weights
from weightlora.methods import CKA, FeedForward, KappaTune, PLoP


def test_experts_are_ranked_where_that_can_be_done() -> None:
    for method, kept in ((FeedForward(), 4), (KappaTune(k=3), 3)):
        made = mixture()
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        selection = wl.attach(made, method, optimizer).selection
        assert selection is not None
        assert selection.k == kept
        if isinstance(method, FeedForward):
            assert all("experts" in name for name in selection.names)
    made = mixture()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(AdapterError, match=r"cka looks at the layers' inputs, which cannot be done to .*experts"):
        wl.attach(made, CKA(), optimizer, held_out=[{}])


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # a layer with GPTQ's interface
@pytest.mark.parametrize("kind", ["4bit", "8bit", "gptq"])
def test_quantised_weights_are_read_as_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To within their rounding, before and in a forward pass, after which the model still trains; or not at all."""
    if kind == "gptq":
        if not GPTQMODEL:
            gptq_layers_are(Codes, monkeypatch)
    else:
        pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: quantised weights are not read")
    whole = base("llama", width=64, dropout=0.0)
    whole.save_pretrained(tmp_path)

    def wrapped(on: Any) -> PeftModel:
        return get_peft_model(
            on, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS")
        )

    def chosen(on: Any, method: Any) -> list[float]:
        made = wrapped(on).train()
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        tuner = wl.attach(made, method, optimizer, held_out=HELD_OUT)
        made(**batch()).loss.backward()
        optimizer.step()
        tuner.step()
        return [choice.score or 0.0 for choice in tuner.finish().choices]

    if kind == "gptq":
        with pytest.raises(AdapterError, match="cannot be read as numbers; use an unquantised base, or one by"):
            chosen(quantised(tmp_path, kind), KappaTune())
        return
    alike = chosen(quantised(tmp_path, kind), PLoP(kinds=2))
    assert alike == pytest.approx(chosen(whole, PLoP(kinds=2)), rel=0.05)
    W = whole.model.layers[0].mlp.down_proj.weight.detach()
    read = list(whole_weights(wrapped(quantised(tmp_path, kind)), "default"))[2]
    assert float((read - W).abs().max()) < (0.2 if kind == "4bit" else 0.01) * float(W.abs().max())

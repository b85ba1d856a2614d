"""How far parameters move in the steps around the seam: folding gates must neither throw nor stop what lives on."""

from __future__ import annotations

import pytest
import torch
from tests.builders import batch, batches, lora

from weightlora.graft.adapters import parameters
from weightlora.methods import AdaLoRA, ALoRA, DynamicLoRA, IncreLoRA, Method, WeightLoRA, WeightLoRAPlus
from weightlora.training import attach

STEPS, RATE, AFTER = 60, 1e-3, 20
# Every method that folds gates and trains on. The others fold at the end, or start anew from LoRA's values.
FOLDS: dict[str, Method] = {
    "adalora": AdaLoRA(tinit=4, tfinal=0.5),
    "increlora": IncreLoRA(),
    "dynamic_lora": DynamicLoRA(tinit=4, tfinal=0.5),
    "alora": ALoRA(rounds=3),
    "weightlora": WeightLoRA.from_preset("paper", k=3, gate_lr=0.5, select_after=0.5),
    "weightlora+": WeightLoRAPlus.from_preset("paper", k=3, gate_lr=0.5, select_after=0.5),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_step_is_as_long_after_the_seam_as_before(name: str) -> None:
    """First, the step itself, root mean square over what moves. Second, what comes later: Adam's second moments must
    be of the gradients that there are now, else each step is that much shorter for as long as they last."""
    model = lora(dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    tuner = attach(model.train(), FOLDS[name], optimizer, max_steps=STEPS, held_out=[batch(4, seed=71)])
    stream, lengths, at = batches(16), list[float](), STEPS
    squares: dict[str, list[float]] = {"A": [], "B": []}
    while len(squares["A"]) < AFTER:
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pairs = list(parameters(model, "default").values())
        before = [[factor.detach().clone() for factor in pair] for pair in pairs]
        optimizer.step()
        moved = [
            (factor.detach() - old).movedim(dim, 0)
            for pair, then in zip(pairs, before, strict=True)
            for dim, (factor, old) in enumerate(zip(pair, then, strict=True))
        ]
        live = torch.cat([rows[rows.abs().sum(1) > 0].flatten() for rows in moved])
        lengths.append(float(live.pow(2).mean().sqrt()))
        if tuner.selection is not None:
            for place, key in enumerate("AB"):
                grads = torch.cat([pair[place].grad.flatten() for pair in pairs])  # type: ignore[union-attr]
                squares[key].append(float(grads.pow(2).mean()))
        if tuner.step() is not None:
            at = len(lengths)
        optimizer.zero_grad()
    assert 0.5 < lengths[at] / lengths[at - 1] < 2
    for place, key in enumerate("AB"):
        states = [optimizer.state[pair[place]] for pair in pairs]
        remembered = torch.cat([s["exp_avg_sq"].flatten() / (1 - 0.999 ** float(s["step"])) for s in states])
        # DynamicLoRA's regulariser is no larger than this even on a model of width 16; on wider ones it vanishes.
        assert float(remembered.mean()) < 3**2 * sum(squares[key]) / AFTER, key

"""Where each preset's values come from, line by line.

``recommended`` is the class's own defaults: what our evidence supports today. ``paper`` is the paper's text.
``official`` is the authors' released code, its known defects named. Values that a source leaves open are ours and say
so.
"""

from __future__ import annotations

from collections.abc import Mapping

PAPER: Mapping[str, object] = {
    "score": "omega",  # 3.3: the adapters with the highest weights are kept
    "gate_lr": 5.0,  # the text gives none; the authors' scripts use 5
    "gate_lr_scheduled": False,  # ours: the text is silent
    "rule": "positive",  # 3.3: an adapter contributes only where omega_i > 0
    "project_every": 1,  # 3.3: "after each omega gradient step, we retain only the Top-K coordinates"
    "k_schedule": "constant",  # 3.3: one K throughout
    "select_after": 0.15,  # 3.3: T "does not exceed one epoch"; the share is ours
    "drift": False,  # ours: the text is silent; an adapter that is off stays where it is
    "init_A": "lora",  # 3.4 refers to Hu et al.'s initialisation
}

OFFICIAL: Mapping[str, object] = {
    "score": "omega",
    "gate_lr": 5.0,  # --learning_rate_w 5e0
    "gate_lr_scheduled": True,  # gates are a parameter group under the common scheduler
    "rule": "signed",  # projection keeps the largest signed values; a negative gate can survive
    "project_every": 1,  # fat_step = 1
    "k_schedule": "constant",
    "select_after": None,  # the code has no T: gates learn to the end, zeroed ones may come back
    "drift": True,  # zero gradients are not None there: momentum and decay go on moving A and B
    "init_A": "official",  # kaiming on a (d_in, r) tensor takes fan-in r: sqrt(d_in / r) times LoRA's scale
    # Not reproduced, because they are defects of the program and not of the method: the dense update in every forward,
    # gates inside the joint gradient clipping, projected gates turned into float32, adapters that are computed though
    # switched off.
}

WEIGHTLORA: Mapping[str, Mapping[str, object]] = {"recommended": {}, "paper": PAPER, "official": OFFICIAL}

WEIGHTLORA_PLUS: Mapping[str, Mapping[str, object]] = {
    "recommended": {},
    "paper": {
        **PAPER,
        "growth": "qr",  # 3.4 offers both; the authors' scripts use "smart", which is QR
        "orthonormal": False,  # 3.4: (I - Q Q^T) N, as printed
    },
    "official": {
        **OFFICIAL,
        "k": 0.25,  # k halves at each of max_fat_steps = 2 events: n / 4
        "k_schedule": "halving",
        "select_after": 20,  # fat_step * max_fat_steps = 10 * 2
        "project_every": 10,  # fat_step
        "comeback": False,  # what the first event drops is removed: it cannot be chosen at the second
        "growth": "qr",  # "smart"
        "noise": "uniform",  # rand_like: U(0, 1), nearly collinear directions
        "orthonormal": False,
        # Departs: the code doubles ranks at each event and before it selects; here growth is one step, at the last
        # event.
    },
}

"""A placement as other trainers read it: the block to paste into each one's own file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig

from weightlora.errors import ConfigError

# What a config says of where it came from or what it is used for, and no trainer is told.
_SILENT = ("base_model_name_or_path", "revision", "inference_mode", "peft_type", "auto_mapping", "peft_version")
_ALWAYS = ("r", "lora_alpha", "lora_dropout", "target_modules")
_PLAIN = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+|[A-Za-z]\w*_\w+")
# What Unsloth's fast path trains as a whole.
_UNSLOTH_WHOLE = re.compile(r"(.*\.)?(embed_tokens|lm_head|\w*norm)")


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    """How one trainer spells a ``LoraConfig``.

    ``keys``: its names for PEFT's fields (None: PEFT's own); any other has no place there. ``tasks``: types of task
    that it sets by itself. ``first``: lines above the settings. ``whole``: alpha must be a whole number. ``call``: the
    settings are arguments between these two lines of Python, not lines of YAML. ``joined``: lists are one text, with
    commas.
    """

    keys: Mapping[str, str] | None
    tasks: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    whole: bool = False
    call: tuple[str, str] | None = None
    joined: bool = False


_SAME = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_TRAINERS = {
    "peft": _Trainer(keys=None, first=("from peft import LoraConfig", ""), call=("peft_config = LoraConfig(", ")")),
    "trl": _Trainer(
        keys={
            **_SAME, "r": "lora_r", "target_modules": "lora_target_modules",
            "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save",
            "task_type": "lora_task_type", "use_rslora": "use_rslora", "use_dora": "use_dora",
        },
        first=("use_peft: true",),
        whole=True,
    ),
    "axolotl": _Trainer(
        keys={
            **_SAME, "r": "lora_r", "target_modules": "lora_target_modules",
            "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save",
            "rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern",
            "use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora", "init_lora_weights": "peft_init_lora_weights",
        },
        tasks=("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"),
        first=("adapter: lora  # qlora with load_in_4bit; leave lora_target_linear out, or it adds all others",),
        whole=True,
    ),
    "llama-factory": _Trainer(
        keys={
            **_SAME, "r": "lora_rank", "target_modules": "lora_target", "modules_to_save": "additional_target",
            "use_rslora": "use_rslora", "use_dora": "use_dora",
        },
        tasks=("CAUSAL_LM",),
        first=("finetuning_type: lora",),
        whole=True,
        joined=True,
    ),
    "unsloth": _Trainer(
        keys=None,
        tasks=("CAUSAL_LM", "SEQ_CLS"),
        call=("model = FastLanguageModel.get_peft_model(\n    model,", ")"),
    ),
}  # fmt: skip
TRAINERS: tuple[str, ...] = tuple(_TRAINERS)


def trainer_block(config: LoraConfig, trainer: str, title: str = "") -> str:
    """Write a config as the block that `trainer` reads: YAML, or Python for ``peft`` and ``unsloth``.

    Args:
        config: targets as a list of full names; every field that differs from PEFT's default is written.
        trainer: one of ``TRAINERS``.
        title: a comment for the first line.

    Raises:
        ConfigError: an unknown trainer, or one whose file has no place for something that the config says.

    >>> print(trainer_block(LoraConfig(target_modules=["model.layers.3.mlp.up_proj"]), "trl"))
    use_peft: true
    lora_r: 8
    lora_alpha: 8
    lora_dropout: 0.0
    lora_target_modules:
      - model.layers.3.mlp.up_proj
    """
    if trainer not in _TRAINERS:
        raise ConfigError(f"trainer {trainer!r} is unknown; use one of {', '.join(TRAINERS)}")
    said, how = _settings(config), _TRAINERS[trainer]
    if said.get("task_type") in how.tasks:
        del said["task_type"]
    _check(said, trainer, how)
    named = said if how.keys is None else {how.keys[name]: value for name, value in said.items()}
    lines = [f"# {title}"] if title else []
    lines += how.first
    if how.call is None:
        for key, value in named.items():
            lines += _yaml(key, value, joined=how.joined)
    else:
        lines += [how.call[0], *(line for key, value in named.items() for line in _python(key, value)), how.call[1]]
    return "\n".join(lines)


def _settings(config: LoraConfig) -> dict[str, object]:
    """The fields that matter: always four, then those that differ from PEFT's defaults."""
    found = {f.name: getattr(config, f.name) for f in fields(config)}
    usual = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
    found["target_modules"] = list(found["target_modules"] or [])
    others = [name for name in found if name not in (*_ALWAYS, *_SILENT) and found[name] not in (usual.get(name), None)]
    return {name: _data(found[name]) for name in (*_ALWAYS, *(name for name in others if found[name] not in ([], {})))}


def _data(value: object) -> object:
    """Plain data: an enumeration's value, and 16 for 16.0."""
    value = getattr(value, "value", value)
    if isinstance(value, dict):
        return {key: _data(each) for key, each in value.items()}
    if isinstance(value, set | tuple):
        return sorted(value)
    return int(value) if isinstance(value, float) and value.is_integer() and value else value


def _check(said: Mapping[str, Any], trainer: str, how: _Trainer) -> None:
    """Everything that the config says must have a place in the trainer's file."""
    else_ = "use 'peft', a LoraConfig for any trainer that takes one in Python"
    for name, value in said.items():
        if how.keys is not None and name not in how.keys:
            raise ConfigError(f"{trainer} has no setting for {name} ({_short(value)}); {else_}")
    alphas = [said["lora_alpha"], *said.get("alpha_pattern", {}).values()]
    broken = [alpha for alpha in alphas if not isinstance(alpha, int)]
    if how.whole and broken:
        raise ConfigError(f"{trainer} takes whole numbers for alpha, and here it is {broken[0]}; {else_}")
    whole = [name for name in said.get("modules_to_save", []) if not _UNSLOTH_WHOLE.fullmatch(name)]
    if trainer == "unsloth" and whole:
        raise ConfigError(
            f"unsloth trains embed_tokens, lm_head and norms as a whole, and not {whole[0]!r}; pass"
            " modules_to_save=None (PEFT adds a classifier's head by itself), or use 'peft'"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _scalar(value: object) -> str:
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value)


def _yaml(key: str, value: object, *, joined: bool) -> list[str]:
    if isinstance(value, list) and joined:
        return [f"{key}: {_scalar(','.join(value))}"]
    if isinstance(value, list):
        return [f"{key}:", *(f"  - {_scalar(each)}" for each in value)]
    if isinstance(value, dict):
        return [f"{key}:", *(f"  {_scalar(name)}: {_scalar(each)}" for name, each in value.items())]
    return [f"{key}: {_scalar(value)}"]


def _python(key: str, value: object) -> list[str]:
    if isinstance(value, list):
        return [f"    {key}=[", *(f"        {_literal(each)}," for each in value), "    ],"]
    if isinstance(value, dict):
        return [f"    {key}={{", *(f"        {_literal(n)}: {_literal(v)}," for n, v in value.items()), "    },"]
    return [f"    {key}={_literal(value)},"]


def _literal(value: object) -> str:
    """Python, with the double quotes of people's own code."""
    return json.dumps(value) if isinstance(value, str) else repr(value)

"""How to do it again: the command that was given, the command of one run alone, the LoRA config for other trainers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath

from weightlora.runs.record import Record

OWN_NAMES = {"weightlora", "__main__.py"}
# Fields of a run's configuration that are not flags of the same name.
NOT_FLAGS = ("schema_version", "settings", "training")
FIRST = ("task", "data_dir", "model", "method", "preset")  # what a reader looks for; then the method's settings
# Fields of PEFT's adapter_config.json that decide what an adapter is, in the order of LoraConfig's own signature.
LORA_FIELDS = (
    "task_type", "r", "target_modules", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip


def started_with(record: Record) -> str:
    """The command as it was given, ready for a shell."""
    words = list(record.argv)
    if words and PurePath(words[0]).name in OWN_NAMES:
        words[0] = "weightlora"
    starts = [index for index, word in enumerate(words) if index and word.startswith("-")] or [len(words)]
    flags = [words[first:last] for first, last in zip(starts, [*starts[1:], len(words)], strict=True)]
    return _lines(shlex.join(words[: starts[0]]), flags)


def alone(record: Record) -> str:
    """The ``weightlora train`` command that makes this run and no other, every setting spelled out; "" without one."""
    config = record.config
    if not {"task", "model", "method"} <= set(config):
        return ""
    values = {key: value for key, value in config.items() if key not in NOT_FLAGS}
    training = dict(_mapping(config.get("training")))
    values = {key: values[key] for key in FIRST if key in values} | dict(_mapping(config.get("settings"))) | values
    values |= training
    return _lines("weightlora train", [_flag(key, value) for key, value in values.items() if value is not None])


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _flag(key: str, value: object) -> list[str]:
    name = "--" + key.replace("_", "-")
    if key == "regression":  # the one switch among a run's fields
        return [name] if value else []
    if isinstance(value, (list, tuple)):
        return [name, *map(str, value)]
    return [name, json.dumps(value) if isinstance(value, Mapping) else str(value)]


def _lines(command: str, flags: list[list[str]]) -> str:
    r"""The command with its flags, several to a line where they are short.

    >>> print(_lines("weightlora train", [["--k", "9"], ["--task", "my task"], ["--model", "one-with-a-long-name"]]))
    weightlora train \
      --k 9 --task 'my task' \
      --model one-with-a-long-name
    """
    lines = [command]
    for words in filter(None, flags):
        text = shlex.join(words)
        if len(lines) > 1 and len(lines[-1]) + len(text) < 44:
            lines[-1] += f" {text}"
        else:
            lines.append(f"  {text}")
    return " \\\n".join(lines)


def lora_config(record: Record, adapter_config: Mapping[str, object] | None) -> str:
    """The placement as Python, from PEFT's own file if there is one, else from the record; "" without LoRA."""
    if adapter_config is not None and adapter_config.get("peft_type", "LORA") != "LORA":
        return ""
    if adapter_config is not None:
        fields = {key: adapter_config.get(key) for key in LORA_FIELDS}
        notes = []
    elif record.kept:
        ranks = {entry.name: entry.rank for entry in record.kept}
        fields = {"r": max(ranks.values()), "target_modules": list(ranks)}
        fields["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != fields["r"]}
        notes = ["# lora_alpha is not in the record: it was alpha / r of the run's settings times each rank"]
        if set(ranks.values()) == {record.config.get("r")} and isinstance(record.config.get("alpha"), (int, float)):
            fields["lora_alpha"], notes = record.config["alpha"], []
        fields["lora_dropout"] = record.config.get("dropout")
    else:
        return ""
    shown = [f"    {key}={_python(value)}," for key, value in fields.items() if value]
    return "\n".join(["from peft import LoraConfig", "", *notes, "config = LoraConfig(", *shown, ")"])


def _python(value: object) -> str:
    """A literal, one entry to a line where there are several."""
    if isinstance(value, (list, tuple)) and len(value) > 1:
        return "[\n" + "".join(f"        {item!r},\n" for item in value) + "    ]"
    if isinstance(value, Mapping) and len(value) > 1:
        return "{\n" + "".join(f"        {key!r}: {item!r},\n" for key, item in value.items()) + "    }"
    return repr(value)

"""The README.md of an export: what it is, what was kept and why, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightlora.graft.profiles import Live
from weightlora.graft.selection import Selection

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_ABOUT = {
    "native": "A LoRA adapter for PEFT. Gates are folded into B; every adapter has the rank and scale of its training.",
    "portable": (
        "A LoRA adapter for PEFT, vLLM, SGLang and llama.cpp: one rank, `lora_alpha` equal to it, every scale folded"
        " into B, and zero adapters where a server fuses q, k and v or gate and up."
    ),
    "dense": (
        "A LoRA adapter for PEFT and for servers that expect an adapter in every layer: as the profile `portable`, with"
        " zero adapters at the same places of all other layers."
    ),
    "gguf": (
        "A LoRA adapter for llama.cpp, as GGUF: the ranks of its training, and the rows of q and k in the order of"
        " llama.cpp."
    ),
    "merged": "A plain Transformers model: the adapter is added into its weights.",
}


def code(text: str) -> str:
    """`text` as a Markdown code span that stays one, also inside a table, whatever it holds.

    >>> code("a|b"), code("x`y")
    ('`a\\\\|b`', '`` x`y ``')
    """
    flat = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {flat} {fence}" if longest else f"{fence}{flat}{fence}"


def model_card(live: Live, *, profile: str, selection: Selection | None, notes: Sequence[str], verified: str) -> str:
    """The text of README.md.

    Args:
        live: what was exported; its adapters are listed as they are before any padding.
        profile: the export profile.
        selection: what the method decided, if known.
        notes: the export's own notes.
        verified: one sentence on the verification.
    """
    base, model_class, heads = live.base_name, type(live.root), tuple(live.heads)
    adapters = [(path, pair.rank, pair.scale) for path, pair in live.pairs.items()]
    lines = [*_front_matter(profile, base), f"# WeightLoRA export, profile {profile}", "", _ABOUT[profile], ""]
    known = code(base) if base else "not recorded"
    lines += [f"Base model: {known} (class {code(model_class.__name__)}). {verified}", ""]
    lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    lines += [
        "## How to load",
        "",
        *_load(profile, base, model_class, bool(heads), live.outside.rows),
        "",
    ]
    lines += ["## What was kept", ""]
    if selection is not None:
        why = " ".join(selection.why.split())
        lines += [
            f"{selection.k} of {selection.n} adapters, by method {code(selection.method)},"
            f" preset {code(selection.preset)}.",
            *([f"Why: {code(why)}"] if why else []),
            "The whole record is in `selection.json`.",
            "",
        ]
    omegas = {} if selection is None else {choice.name: choice.omega for choice in selection.choices}
    lines += _table(adapters, omegas)
    if heads:
        lines += ["", f"Trained as a whole: {', '.join(map(code, heads))}."]
    return "\n".join(lines) + "\n"


def _front_matter(profile: str, base: str | None) -> list[str]:
    """YAML that hubs read. A folder on somebody's disk is no base model to link to."""
    linkable = base is not None and bool(_HUB_NAME.fullmatch(base)) and not Path(base).exists()
    library = {"merged": ["library_name: transformers"], "gguf": []}.get(profile, ["library_name: peft"])
    return [
        "---",
        *library,
        *([f"base_model: {json.dumps(base)}"] if linkable else []),
        "tags:",
        *(["- lora"] if profile != "merged" else []),
        *(["- gguf"] if profile == "gguf" else []),
        "- weightlora",
        "---",
        "",
    ]


def _load(profile: str, base: str | None, model_class: type, heads: bool, rows: int | None) -> list[str]:
    if profile == "gguf":
        made = f"convert_hf_to_gguf.py {base or 'BASE'} --outfile base.gguf  # llama.cpp's own, once"
        return ["```text", made, "llama-server -m base.gguf --lora adapter.gguf", "```"]
    lines = _load_in_python(profile, base, model_class, heads, rows)
    return ["```python", *lines, "```"]


def _load_in_python(profile: str, base: str | None, model_class: type, heads: bool, rows: int | None) -> list[str]:
    home = "transformers" if model_class.__module__.startswith("transformers.") else model_class.__module__
    name = model_class.__name__
    if profile == "merged":
        return [f"from {home} import {name}", "", f'model = {name}.from_pretrained("this folder")']
    separate = heads and profile != "native"
    return [
        "from peft import PeftModel",
        *(["from safetensors.torch import load_file"] if separate else []),
        f"from {home} import {name}",
        "",
        f"base = {name}.from_pretrained({json.dumps(base or 'the base model')})",
        *([f"base.resize_token_embeddings({rows})"] if rows else []),
        *(['base.load_state_dict(load_file("this folder/head.safetensors"), strict=False)'] if separate else []),
        'model = PeftModel.from_pretrained(base, "this folder")',
    ]


def _table(adapters: Sequence[tuple[str, int, float]], omegas: Mapping[str, float]) -> list[str]:
    if not adapters:
        return ["No adapters: the whole model was trained."]
    rows = [
        f"| {code(name)} | {rank} | {scale:.6g} | {format(omegas[name], '.4g') if name in omegas else '-'} |"
        for name, rank, scale in adapters
    ]
    return ["| adapter | rank | scale | omega |", "|---|---|---|---|", *rows]

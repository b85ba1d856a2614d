"""Exports by the published rules of servers that do not run here, and PEFT's own hot-swap, which does.

vLLM: ``vllm/lora/peft_helper.py`` at 0214369, ``vllm/config/lora.py`` at 01230b4. SGLang:
``srt/lora/lora_config.py`` at 0ceb81f. Their layers and buffers as of August 2026. All were read, and are said again
here in our own words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tests.graft.test_export import batch, fresh, operated, run, wrapped
from torch import Tensor

from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.profiles import VLLM_RANKS
from weightlora.graft.surgery import disconnect

PREFIX, SUFFIX = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Files:
    """An adapter's folder as a server opens it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, folder: Path) -> Files:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return cls(config, load_file(folder / "adapter_model.safetensors"))

    @property
    def modules(self) -> list[str]:
        return [key.removeprefix(PREFIX).removesuffix(SUFFIX[0]) for key in self.tensors if key.endswith(SUFFIX[0])]

    @property
    def ranks(self) -> set[int]:
        return {int(tensor.shape[0]) for key, tensor in self.tensors.items() if key.endswith(SUFFIX[0])}


def refused_by_vllm(files: Files, max_lora_rank: int) -> list[str]:
    """Why it is not loaded."""
    config = files.config
    faults = [name for name in ("modules_to_save", "use_dora") if config.get(name)]
    faults += ["bias"] if config.get("bias", "none") != "none" else []
    faults += ["rank"] if config["r"] > max_lora_rank else []
    return faults + ["names" for key in files.tensors if not (key.startswith(PREFIX) and key.endswith(SUFFIX))]


def refused_by_sglang(files: Files) -> list[str]:
    """Why it is not loaded."""
    config = files.config
    targets = config["target_modules"]
    faults = [] if isinstance(targets, list) or targets == "all-linear" else ["target_modules"]
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        faults += [field for value in (config.get(field) or {}).values() if value != default]
    faults += ["rank"] if files.ranks != {config["r"]} else []
    there = set(files.modules)
    for module in there:
        parent, _, kind = module.rpartition(".")
        if kind in ("q_proj", "k_proj") and f"{parent}.v_proj" not in there:
            faults.append("v_proj")
        if kind in ("k_proj", "v_proj") and f"{parent}.q_proj" not in there:
            faults.append("q_proj")
    return faults


def served(name: str, files: Files) -> Tensor:
    """Logits by the rule of both: one alpha / r for every module, zeros where the file has none."""
    model, factor = fresh(name), files.config["lora_alpha"] / files.config["r"]
    with torch.no_grad():
        for module in files.modules:
            A, B = (files.tensors[PREFIX + module + suffix] for suffix in SUFFIX)
            weight = model.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            weight += factor * B @ A
    return run(model, batch(name))


@pytest.mark.parametrize("profile", ["portable", "dense"])
def test_servers_take_it_and_compute_what_the_live_model_does(tmp_path: Path, profile: str) -> None:
    live = operated("llama")
    done = export(live, tmp_path / "out", profile)
    files = Files.of(done.path)
    (said,) = (note for note in done.notes if note.startswith("vLLM: --max-lora-rank"))
    step = int(said.split()[-1])
    assert step == min(each for each in VLLM_RANKS if each >= files.config["r"])
    assert (refused_by_vllm(files, step), refused_by_sglang(files)) == ([], [])
    torch.testing.assert_close(served("llama", files), run(live, batch("llama")), rtol=0, atol=1e-5)
    if profile == "dense":  # TGI and its like drop a kind of module that one layer lacks
        kinds = {module.partition("layers.")[2].partition(".")[2] for module in files.modules}
        assert len(files.modules) == 3 * len(kinds)


def test_the_rules_find_what_a_native_file_would_do_there(tmp_path: Path) -> None:
    """Ranks and scales that differ: SGLang says no, vLLM says nothing and computes something else."""
    live = operated("llama")
    files = Files.of(export(live, tmp_path / "out", "native").path)
    assert {"rank_pattern", "alpha_pattern", "rank", "v_proj"} <= set(refused_by_sglang(files))
    assert refused_by_vllm(files, 64) == []
    assert (served("llama", files) - run(live, batch("llama"))).abs().max() > 1e-2
    headed = Files.of(export(operated("llama-cls"), tmp_path / "headed", "native").path)
    assert {"modules_to_save", "names"} <= set(refused_by_vllm(headed, 64))


def pruned(kept: range) -> PeftModel:
    model = wrapped("llama", seed=kept.start)
    disconnect(model, [adapter.name for adapter in adapters(model) if adapter.index not in kept])
    return model


def test_a_pruned_adapter_is_swapped_in_where_the_first_one_covers_it(tmp_path: Path) -> None:
    """PEFT swaps into the modules that are there; what the new file lacks becomes zero, what it adds is an error."""
    first, second = pruned(range(0, 9)), pruned(range(3, 6))
    for name, model in (("first", first), ("second", second)):
        for profile in ("native", "dense"):
            export(model, tmp_path / f"{name}-{profile}", profile)
    wanted = {name: run(model, batch("llama")) for name, model in (("first", first), ("second", second))}

    serving = PeftModel.from_pretrained(fresh("llama"), tmp_path / "first-native")
    hotswap_adapter(serving, str(tmp_path / "second-native"), "default")
    torch.testing.assert_close(run(serving, batch("llama")), wanted["second"], rtol=0, atol=1e-5)

    serving = PeftModel.from_pretrained(fresh("llama"), tmp_path / "second-native")
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(serving, str(tmp_path / "first-native"), "default")

    serving = PeftModel.from_pretrained(fresh("llama"), tmp_path / "first-dense")
    for name in ("second", "first", "second"):
        hotswap_adapter(serving, str(tmp_path / f"{name}-dense"), "default")
        torch.testing.assert_close(run(serving, batch("llama")), wanted[name], rtol=0, atol=1e-5)

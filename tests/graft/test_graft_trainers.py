"""The blocks for other trainers: each is read by the trainer itself, which puts the adapters where they should be."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tests.foreign import python_packages, run_python
from tests.graft.trainer_run import adapters, llama
from torch import nn

from weightlora.errors import CheckpointError, ConfigError
from weightlora.graft.selection import Choice, Selection
from weightlora.graft.trainers import TRAINERS, trainer_block

SCRIPT = Path(__file__).with_name("trainer_run.py")
# Axolotl asks for versions of PEFT and Transformers of its own, and runs with ours; LLaMA-Factory does not.
AXOLOTL = ("axolotl==0.19.0", "addict==2.4.0", "posthog==6.7.11", "backoff==2.2.1", "distro==1.9.0")
LLAMA_FACTORY = (
    "llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0",
    "datasets==4.0.0", "tokenizers==0.22.2", "huggingface_hub==1.17.0", "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3", "httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.11.0",
    "sniffio==1.3.1", "tyro==0.8.14",
)  # fmt: skip
# What FastLanguageModel.get_peft_model of Unsloth 2026.10.9 takes by name; more goes to PEFT's LoraConfig. It asks for
# a GPU as soon as it is imported, so that its documented names have to do.
UNSLOTH = {
    "model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "layers_to_transform", "layers_pattern",
    "finetune_last_n_layers", "use_gradient_checkpointing", "random_state", "max_seq_length", "use_rslora",
    "modules_to_save", "init_lora_weights", "loftq_config", "temporary_location", "qat_scheme", "target_parameters",
    "ensure_weight_tying", "offload_layers", "checkpoint_skip_layers",
}  # fmt: skip
LINEAR = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def selection(*ranks: int, every: int = 3) -> Selection:
    """Every so many linear layers of the small Llama, with these ranks in turn; alpha is twice the rank."""
    return Selection(
        method="weightlora+", preset="recommended", step=9, why="as a test wants it",
        choices=tuple(
            Choice(name=name, kept=i % every == 1, omega=1.0, score=None, rank=ranks[i % len(ranks)], scale=2.0)
            for i, name in enumerate(LINEAR)
        ),
    )  # fmt: skip


SAME, DIFFERENT = selection(4), selection(4, 6)
ONE = selection(4, every=len(LINEAR))


def wanted(chosen: Selection, dropout: float = 0.0) -> dict[str, Any]:
    return {choice.name: (choice.rank, choice.scale, dropout) for choice in chosen.kept}


def python(block: str) -> ast.Call:
    (call,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    return call


@pytest.mark.parametrize("chosen", [SAME, DIFFERENT, ONE])
@pytest.mark.parametrize("trainer", ["peft", "unsloth"])
def test_python_makes_the_same_config(chosen: Selection, trainer: str) -> None:
    block = chosen.to(trainer, lora_dropout=0.1, task_type="CAUSAL_LM")
    assert block.splitlines()[0] == f"# {chosen.k} of {chosen.n} adapters, chosen by weightlora+ (recommended)"
    call = python(block)
    said = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    if trainer == "peft":
        space: dict[str, Any] = {}
        exec(block, space)
        config = space["peft_config"]
    else:
        assert ast.unparse(call.func) == "FastLanguageModel.get_peft_model"
        assert [ast.unparse(each) for each in call.args] == ["model"]
        assert set(said) - UNSLOTH <= {"rank_pattern", "alpha_pattern"}
        config = LoraConfig(**said, task_type="CAUSAL_LM")
    assert config.task_type == "CAUSAL_LM"
    assert adapters(get_peft_model(llama(), config)) == wanted(chosen, 0.1)


@pytest.mark.parametrize("chosen", [SAME, ONE])
def test_trl_reads_its_file(chosen: Selection, tmp_path: Path) -> None:
    from trl import ModelConfig, TrlParser, get_peft_config

    path = tmp_path / "sft.yaml"
    path.write_text(chosen.to("trl", lora_dropout=0.1, task_type="CAUSAL_LM"), encoding="utf-8")
    (config,) = TrlParser((ModelConfig,)).parse_args_and_config(["--config", str(path)])
    model = get_peft_model(llama(), get_peft_config(config))
    assert isinstance(model, PeftModel)
    assert adapters(model) == wanted(chosen, 0.1)


def read_by(trainer: str, packages: Path, folder: Path, *blocks: str, **settings: str) -> list[dict[str, Any]]:
    paths = [folder / f"{number}.yaml" for number in range(len(blocks))]
    for path, block in zip(paths, blocks, strict=True):
        path.write_text(block, encoding="utf-8")
    said = run_python(SCRIPT, packages, trainer, *map(str, paths), **settings)
    found = json.loads(said.splitlines()[-1])
    return [{name: tuple(each) for name, each in one.items()} for one in found]


@pytest.mark.long
def test_axolotl_reads_its_file(tmp_path: Path) -> None:
    packages = python_packages("axolotl", *AXOLOTL)
    blocks = [chosen.to("axolotl", lora_dropout=0.1, task_type="CAUSAL_LM") for chosen in (DIFFERENT, ONE)]
    found = read_by("axolotl", packages, tmp_path, *blocks, AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1")
    assert found == [wanted(DIFFERENT, 0.1), wanted(ONE, 0.1)]


@pytest.mark.long
def test_llama_factory_reads_its_file(tmp_path: Path) -> None:
    packages = python_packages("llama-factory", *LLAMA_FACTORY)
    blocks = [chosen.to("llama-factory", lora_dropout=0.1, task_type="CAUSAL_LM") for chosen in (SAME, ONE)]
    assert read_by("llama-factory", packages, tmp_path, *blocks) == [wanted(SAME, 0.1), wanted(ONE, 0.1)]


@pytest.mark.parametrize(
    ("trainer", "settings", "said"),
    [
        ("trl", {"rank_pattern": {"a": 3}}, "trl has no setting for rank_pattern"),
        ("trl", {"init_lora_weights": "pissa"}, "trl has no setting for init_lora_weights"),
        ("trl", {"lora_alpha": 6.5}, "trl takes whole numbers for alpha, and here it is 6.5"),
        ("axolotl", {"alpha_pattern": {"a": 2.5}}, "axolotl takes whole numbers for alpha, and here it is 2.5"),
        ("axolotl", {"layer_replication": [(0, 2)]}, "axolotl has no setting for layer_replication"),
        ("llama-factory", {"rank_pattern": {"a": 3}}, "llama-factory has no setting for rank_pattern"),
        ("llama-factory", {"task_type": "SEQ_CLS"}, "llama-factory has no setting for task_type"),
        ("unsloth", {"modules_to_save": ["score"]}, "not 'score'"),
        ("verl", {}, "trainer 'verl' is unknown; use one of peft, trl, axolotl, llama-factory, unsloth"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(trainer: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        SAME.to(trainer, **settings)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_everything_else_that_a_config_says_is_in_the_block(trainer: str) -> None:
    config = LoraConfig(
        r=4, lora_alpha=16.0, target_modules=["on", "a.b"], modules_to_save=["lm_head", "model.norm"],  # type: ignore[arg-type]
        use_rslora=True, rank_pattern={}, base_model_name_or_path="somewhere", inference_mode=True,
    )  # fmt: skip
    block = trainer_block(config, trainer)
    assert "somewhere" not in block
    assert "16.0" not in block
    assert '"on"' in block or '"a.b,on"' in block or '"on,a.b"' in block, "YAML reads a bare on as true"
    for word in ("a.b", "lm_head", "model.norm", "rslora", "16"):
        assert word in block


def test_what_is_switched_off_is_said() -> None:
    assert "init_lora_weights=False" in SAME.to("peft", init_lora_weights=False)
    assert "peft_init_lora_weights: false" in SAME.to("axolotl", init_lora_weights=False)


def test_nothing_kept_is_no_placement() -> None:
    with pytest.raises(CheckpointError, match="keeps no adapter"):
        Selection(method="random", preset="recommended", step=0, why="", choices=()).to("peft")

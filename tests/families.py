"""Today's model families, each as small as its config goes, and what each of them is put through.

python -m tests.families    # writes docs/families.md from what has run
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tests.builders import VOCABULARY, adapter_state, max_difference, trainer
from torch import Tensor
from transformers import Trainer

from weightlora.cost import kept_bytes
from weightlora.cost.plan_spec import PlanConfig
from weightlora.errors import AdapterError, ExportError, PlanError
from weightlora.graft.adapters import adapters
from weightlora.graft.export import export
from weightlora.graft.fast import fast_path
from weightlora.methods import WeightLoRA, WeightLoRAPlus
from weightlora.runs.plan import adapted, loss_of, planner_for
from weightlora.training import FitResult, fit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
STEPS, SEAM, LENGTH = 4, 2, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8}  # fmt: skip
# A picture of 4 x 4 patches, of which the tower makes 2 x 2 tokens.
SEEN, PICTURE = 50, (1, 4, 4)
TOWERS: dict[str, Any] = {
    "text_config": {**SIZES, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}, "pad_token_id": 0,
    "vision_config": {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1], "in_channels": 3,
        "temporal_patch_size": 2, "initializer_range": 0.2,
    },
    "image_token_id": SEEN, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {**SIZES, "model_type": "mixtral", "num_local_experts": 4}
STACKS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "pad_token_id": 0, "eos_token_id": 2, "use_cache": False,
    "dropout": 0.0, "dropout_rate": 0.0, "init_std": 0.2, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family by a tiny config; `targets`: in the words of ``--targets``."""

    title: str
    architecture: str
    config: Mapping[str, Any]
    targets: str = "attention"

    @property
    def experts(self) -> bool:
        """Whether some adapters are on experts."""
        return "experts" in self.targets

    def folder(self, where: Path) -> Path:
        """A folder with the config alone, as a hub repository has it."""
        where.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.config, "architectures": [self.architecture]})
        (where / "config.json").write_text(text, encoding="utf-8")
        return where

    def plan(self, where: Path) -> PlanConfig:
        """What its planner is told."""
        return PlanConfig(
            model=str(self.folder(where)), targets=self.targets, r=2, k=3, length=LENGTH, batch=4, dropout=0.0,
            device="cpu", gated=False,
        )  # fmt: skip

    def model(self, where: Path) -> PeftModel:
        """With random weights, and an adapter on each target."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: Any = adapted(self.plan(where), "cpu")[1]
        return made  # type: ignore[no-any-return]

    def rows(self, count: int = 16) -> list[dict[str, Any]]:
        """Texts to continue, or to classify; with a picture each where the model sees."""
        generator = torch.Generator().manual_seed(0)
        rows: list[dict[str, Any]] = []
        for _ in range(count):
            ids = torch.randint(5, 45, (LENGTH,), generator=generator)
            ids[-1] = 2
            row: dict[str, Any] = {"input_ids": ids, "labels": ids}
            if self.architecture.endswith("Classification"):
                row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] > 25)}
            if "vision_config" in self.config:
                ids[1:6] = torch.tensor([52, *[SEEN] * 4])
                row |= {
                    "pixel_values": torch.randn(16, 96, generator=generator),
                    "image_grid_thw": torch.tensor([PICTURE]),
                    "mm_token_type_ids": (ids == SEEN).long(),
                }
            rows.append(row)
        return rows

    def trainer(self, out: Path, **arguments: Any) -> Trainer:
        """A stock trainer around a fresh model."""
        settings = {"steps": STEPS, "logging_steps": 1, "data": self.rows(), "remove_unused_columns": False}
        made = trainer(out, self.model(out.parent / "base"), **{**settings, **arguments})
        made.data_collator = collate
        return made


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One batch; the patches of all pictures are rows of one tensor."""
    joined = ("pixel_values", "image_grid_thw")
    batch = {key: [torch.as_tensor(row[key]) for row in rows] for key in rows[0]}
    return {key: torch.cat(each) if key in joined else torch.stack(each) for key, each in batch.items()}


FAMILIES = {
    family.title: family
    for family in (
        Family(title="Llama 3", architecture="LlamaForCausalLM",
               config={**SIZES, "model_type": "llama", "rope_parameters": LLAMA3}),
        Family(title="Qwen3", architecture="Qwen3ForCausalLM", config={**SIZES, "model_type": "qwen3"}),
        Family(title="Gemma 3", architecture="Gemma3ForCausalLM", targets="attention,down_proj",
               config={**SIZES, "model_type": "gemma3_text", "sliding_window": 4}),
        Family(title="Mistral", architecture="MistralForCausalLM",
               config={**SIZES, "model_type": "mistral", "sliding_window": 4}),
        Family(title="Phi-3, Phi-4", architecture="Phi3ForCausalLM", targets="attention,o_proj,down_proj",
               config={**SIZES, "model_type": "phi3"}),
        Family(title="Mixtral, attention", architecture="MixtralForCausalLM", config=MIXTRAL),
        Family(title="Mixtral, with experts", architecture="MixtralForCausalLM", config=MIXTRAL,
               targets="attention,experts"),
        Family(title="Qwen3-MoE, with experts", architecture="Qwen3MoeForCausalLM", targets="attention,experts",
               config={**SIZES, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                       "moe_intermediate_size": 8}),
        Family(title="gpt-oss, with experts", architecture="GptOssForCausalLM", targets="attention,experts",
               config={**SIZES, "model_type": "gpt_oss", "num_local_experts": 4, "rope_parameters": YARN}),
        Family(title="ModernBERT", architecture="ModernBertForSequenceClassification", targets="attention,Wo",
               config={**{k: v for k, v in SIZES.items() if "head" not in k}, "num_attention_heads": 2,
                       "model_type": "modernbert", "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4,
                       "global_attn_every_n_layers": 2}),
        Family(title="T5", architecture="T5ForConditionalGeneration",
               config={**STACKS, "model_type": "t5", "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
                       "decoder_start_token_id": 0}),
        Family(title="BART", architecture="BartForConditionalGeneration",
               config={**STACKS, "model_type": "bart", "encoder_layers": 2, "decoder_layers": 2, "bos_token_id": 1,
                       "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
                       "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}),
        Family(title="Qwen2.5-VL, language tower", architecture="Qwen2_5_VLForConditionalGeneration",
               config={**TOWERS, "model_type": "qwen2_5_vl"}),
        Family(title="Qwen2.5-VL, both towers", architecture="Qwen2_5_VLForConditionalGeneration",
               config={**TOWERS, "model_type": "qwen2_5_vl"}, targets="attention,vision"),
    )
}  # fmt: skip
PROFILES = ("native", "portable", "dense", "merged")
COLUMNS = ("train", "gates", "grow", "resume", *PROFILES, "plan")


@dataclass
class Story:
    """What one family went through: ``cells``: "yes", or why not in the library's own words, by column."""

    family: Family
    out: Path
    cells: dict[str, str] = field(default_factory=dict)

    def tell(self) -> dict[str, str]:
        """Run everything; what is not refused by name, and not as it should be, raises."""
        self._trains_as_stock()
        result = self._gated_and_grown() if not self.family.experts else self._selected()
        self._resumed(result)
        for profile in PROFILES:
            self.cells[profile] = self._exported(result, profile)
        self._planned()
        return {column: self.cells[column] for column in COLUMNS}

    def _trains_as_stock(self) -> None:
        """Every adapter kept, through the seam: the stock trainer's weights, and costs as foretold."""
        plain, ours = (self.family.trainer(self.out / name) for name in ("stock", "all"))
        plain.train()
        result = fit(ours, WeightLoRA(k=1.0, select_after=SEAM), engine="stock")
        assert max_difference(adapter_state(plain.model), adapter_state(ours.model)) == 0.0
        assert set(result.predicted) == {"warmup", "final"}
        for phase in result.phases:
            assert result.predicted[phase.name]["kept_activation_bytes"] == phase.kept_activation_bytes
        self.cells["train"] = "yes"

    def _gated_and_grown(self) -> FitResult:
        """The published rule: gates learn, K live, and they grow into what was set free."""
        made = self.family.trainer(self.out / "run", save_strategy="steps", save_steps=1)
        result = fit(made, self.grown, measure=False)
        assert result.selection is not None
        live = adapters(made.model)  # type: ignore[arg-type]
        assert [a.name for a in live] == list(result.selection.names)
        assert len(live) == 3
        assert min(a.rank for a in live) > 2
        assert any(choice.omega != 1.0 for choice in result.selection.choices)
        self.cells |= {"gates": "yes", "grow": "yes"}
        return result

    @property
    def grown(self) -> WeightLoRAPlus:
        """Gates and growth."""
        return WeightLoRAPlus.from_preset("paper", k=3, select_after=SEAM)

    @property
    def chosen(self) -> WeightLoRA:
        """Without either, as experts have it."""
        return WeightLoRA(k=0.5, select_after=SEAM)

    def _selected(self) -> FitResult:
        refusals = {
            "gates": WeightLoRA.from_preset("paper", k=3, select_after=SEAM),
            "grow": WeightLoRAPlus(k=3, select_after=SEAM),
        }
        for column, refused in refusals.items():
            try:
                fit(self.family.trainer(self.out / column), refused, measure=False)
            except AdapterError as error:
                self.cells[column] = f"refused: {error}"
        made = self.family.trainer(self.out / "run", save_strategy="steps", save_steps=1)
        result = fit(made, self.chosen, measure=False)
        assert result.selection is not None
        assert 0 < result.selection.k < result.selection.n
        assert any(choice.experts for choice in result.selection.kept)
        return result

    def _resumed(self, result: FitResult) -> None:
        """From the middle of warm-up and from after the seam: the same weights."""
        method = self.chosen if self.family.experts else self.grown
        for step in (1, 3):
            again = self.family.trainer(self.out / "run", save_strategy="steps", save_steps=1)
            resumed = fit(again, method, resume=self.out / "run" / f"checkpoint-{step}", measure=False)
            assert resumed.selection == result.selection
            assert max_difference(adapter_state(again.model), adapter_state(result.model)) == 0.0
        self.cells["resume"] = "yes"

    def _exported(self, result: FitResult, profile: str) -> str:
        """The export compares logits itself, and raises where they differ."""
        batch = collate(self.family.rows(4))
        wanted = {key: value for key, value in batch.items() if key != "labels"}
        # An encoder-decoder reads its answer, too.
        sample = batch if self.family.config["model_type"] in ("t5", "bart") else wanted
        try:
            export(result, self.out / profile, profile, sample=sample)
        except ExportError as error:
            if "cannot hold" not in str(error):
                raise
            return f"refused: {error}"
        return "yes"

    def _planned(self) -> None:
        """From the config alone: what all adapters keep, to the byte."""
        config = self.family.plan(self.out / "plan")
        try:
            planner = planner_for(config)
        except PlanError as error:
            self.cells["plan"] = f"refused: {error}"
            return
        bones, model = adapted(config, "cpu")
        fast_path(model)
        counted = kept_bytes(model, loss_of(model, bones.batch(4, LENGTH), on=False))
        assert planner.estimate.activations(planner.warmup(), 4) == counted
        assert planner.plan().k == 3
        self.cells["plan"] = "yes"


def refusals(cells: Mapping[str, str]) -> dict[str, str]:
    """What was refused and why, by column, without the numbers and names of one model."""
    said = {column: text.removeprefix("refused: ") for column, text in cells.items() if text != "yes"}
    return {
        column: re.sub(r"^(profile '\w+' cannot hold )?\d+ | \(model[^)]*\)", r"\1", s) for column, s in said.items()
    }


def row(family: Family, cells: Mapping[str, str]) -> str:
    """One line of the table."""
    words = ["yes" if cells[column] == "yes" else "refused" for column in COLUMNS]
    return "| " + " | ".join([family.title, f"`{family.architecture}`", f"`{family.targets}`", *words]) + " |"


def notes(cells: Mapping[str, str]) -> list[str]:
    """The refusals as a list's lines."""
    return [f"- `{column}`: {text}" for column, text in refusals(cells).items()]


def page(told: Mapping[str, Mapping[str, str]]) -> str:
    """The whole of docs/families.md."""
    head = ["family", "class of Transformers", "`--targets`", *COLUMNS]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    table += [row(FAMILIES[title], cells) for title, cells in told.items()]
    listed = list(dict.fromkeys(line for cells in told.values() for line in notes(cells)))
    return "\n".join([INTRODUCTION, *table, "", REFUSED, *listed, "", CLOSING])


INTRODUCTION = """# Model families

This page lists the model families that were tried, and what works with each. `python -m tests.families` writes it;
`tests/test_families.py` runs every row again and compares. Each family is a model of two blocks of width 16 with random
weights. So the table shows that the code works there. It does not say how good a selection is.

- `train`: if every adapter is kept, the weights are those of the stock trainer to the bit. The bytes that each phase
  keeps for the backward pass are as predicted.
- `gates`, `grow`: the rule of the paper. Gates (numbers that scale adapters) learn, 3 adapters are kept, and they
  grow to the parameters of all.
- `resume`: resumed before and after the removal of adapters, the run ends in the weights of a run that was not stopped
  (with adapters on experts: of `weightlora` with credit, which keeps half of them).
- `native`, `portable`, `dense`, `merged`: the export is written and opened by stock PEFT or Transformers, and its
  logits are those of the trained model.
- `plan`: the kept bytes that the planner computes from the config are those counted on real weights.
"""
REFUSED = "What is refused, and the message, which comes before anything runs or is written:\n"
CLOSING = """## What is adapted

`--targets` of every command, and of `weightlora plan` for a hub name, a folder or a `config.json`:

- `all-linear` (the default): every linear layer in the blocks. In a model for images and text, those of its language
  model.
- `attention`: query, key and value projections, fused ones too (`qkv_proj` of Phi, `Wqkv` of ModernBERT).
- `experts`: the parameters in which a mixture of experts stacks its experts. Each of them has one adapter (PEFT's
  `target_parameters`), without dropout (`--dropout 0`). Adapters on all experts are large: on the 64 stacks of
  Mixtral-8x7B, 13.1 million numbers for each rank.
- `vision`: linear layers in the blocks of the image encoder, and in what joins it to the language model.
- endings of names, and several of all these, comma-separated: `attention,experts`, `all-linear,vision`,
  `q_proj,down_proj`.

In Python, give them to `LoraConfig`, and the PEFT model to `fit`:

<!-- run -->
```python
from peft import LoraConfig

LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
```

For a model for images and text, name the language model there (`target_modules=r".*language_model.*(q_proj|v_proj)"`):
PEFT's own "all-linear" and endings of names also match the image encoder.

PEFT adds the adapter of a stack of experts to the whole weight. Such adapters can be trained, ranked by credit,
gradient or chance, removed, resumed, and exported as `native` and `merged`. They can have no gates, their ranks
cannot change, and FSDP does not shard the weights under them. Removing one saves much memory: the copy of the whole
weight that PEFT makes in every forward pass. PEFT loads several such adapters onto one model only if all are on the
same parameters.
"""


def main() -> None:
    """Run everything and write the page."""
    told: dict[str, dict[str, str]] = {}
    for title, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as out:
            told[title] = Story(family, Path(out)).tell()
        sys.stdout.write(f"{title}: {told[title]}\n")
    PAGE.write_text(page(told), encoding="utf-8")


if __name__ == "__main__":
    main()

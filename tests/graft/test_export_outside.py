"""What of a trained model is not in its adapters: written, or refused by name; always on a base loaded anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.builders import VOCABULARY, trainer, warm
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from weightlora.errors import ExportError
from weightlora.graft.export import Export, export
from weightlora.methods import WeightLoRA
from weightlora.training import attach, fit

NEW = 5
TARGETS = ["q_proj", "v_proj"]


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A language model on disk, with embeddings of its own and tied ones."""
    made = {}
    for tied in (False, True):
        made[tied] = tmp_path_factory.mktemp("base")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            LlamaForCausalLM(config(tied)).save_pretrained(made[tied])
    return made


def opened(folder: Path, rows: int = 0, seed: int = 0) -> LlamaForCausalLM:
    """The base as its user loads it, with room for new tokens if asked; those begin at random."""
    model = LlamaForCausalLM.from_pretrained(folder)
    if rows:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapted(base: PreTrainedModel, seed: int = 4, **settings: Any) -> PeftModel:
    """LoRA as if trained, on whatever it trains."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about tied weights
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **settings}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids(top: int = VOCABULARY) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    tokens[:, 2] = top - 1
    return tokens


def answer(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def reopened(done: Export, fresh: PreTrainedModel) -> nn.Module:
    """As a user would: a head that lies apart first, then stock PEFT, or Transformers."""
    if done.profile == "merged":
        return type(fresh).from_pretrained(done.path)
    if (done.path / "head.safetensors").exists():
        fresh.load_state_dict(load_file(done.path / "head.safetensors"), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(fresh, done.path)


def norms(base: LlamaForCausalLM) -> PeftModel:
    model = adapted(base)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True).data.add_(0.3)
    return model


def frozen_again(base: LlamaForCausalLM) -> PeftModel:
    return norms(base).requires_grad_(False)


def embedded(base: LlamaForCausalLM) -> PeftModel:
    """A row of the embeddings set by hand, which nothing shows but the base's own file."""
    with torch.no_grad():
        base.model.embed_tokens.weight[VOCABULARY - 1] += 1.0
    return adapted(base)


ROWS = VOCABULARY + NEW
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
SINGLE = {"trainable_token_indices": [4, VOCABULARY - 1]}
# name: (tied, rows, how the model is made, what profiles for servers say: None where they hold it)
CASES: dict[str, tuple[bool, int, Callable[[Any], PeftModel], str | None]] = {
    "nothing": (False, 0, adapted, None),
    "new rows, frozen": (False, ROWS, adapted, r"embed_tokens.weight: \[65, 16\], the base's \[60, 16\]"),
    "new rows, tied, frozen": (True, ROWS, adapted, r"embed_tokens.weight: \[65, 16\], the base's"),
    "new rows, saved": (False, ROWS, lambda b: adapted(b, **BOTH), None),
    "new rows, one saved": (False, ROWS, lambda b: adapted(b, modules_to_save=["lm_head"]), "embed_tokens.weight"),
    "new rows, trained alone": (
        False, ROWS, lambda b: adapted(b, trainable_token_indices=list(range(VOCABULARY, ROWS))), "cannot hold",
    ),
    "single tokens": (False, 0, lambda b: adapted(b, **SINGLE), "trains single tokens"),
    "single tokens, tied": (True, 0, lambda b: adapted(b, **SINGLE), "trains single tokens"),
    "head": (False, 0, lambda b: adapted(b, modules_to_save=["lm_head"]), None),
    "head, tied": (True, 0, lambda b: adapted(b, modules_to_save=["lm_head"]), "lm_head was .* ties it to model.embed"),
    "embedding, tied": (True, 0, lambda b: adapted(b, modules_to_save=["embed_tokens"]), "base ties it to lm_head"),
    "both, tied": (True, 0, lambda b: adapted(b, **BOTH), "ties it to"),
    "both, tied, kept so": (True, 0, lambda b: adapted(b, **BOTH, ensure_weight_tying=True), None),
    "norms": (False, 0, norms, "model.layers.0.input_layernorm.weight: trained"),
    "norms, frozen again": (False, 0, frozen_again, "input_layernorm.weight: not the base's"),
    "a row by hand": (False, 0, embedded, "model.embed_tokens.weight: not the base's"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_profile_does_on_a_fresh_base_or_says_why_not(
    case: str, folders: dict[bool, Path], tmp_path: Path
) -> None:
    tied, rows, make, says = CASES[case]
    model = make(opened(folders[tied], rows, seed=1))
    tokens = ids(rows or VOCABULARY)
    truth = answer(model, tokens)
    for profile in ("native", "portable", "dense", "merged"):
        if says is not None and profile in ("portable", "dense"):
            with pytest.raises(ExportError, match=f"{says}.*use profile 'native' or 'merged'"):
                export(model, tmp_path / profile, profile)
            assert not (tmp_path / profile).exists()
            continue
        done = export(model, tmp_path / profile, profile)
        close(answer(reopened(done, opened(folders[tied], rows, seed=2)), tokens), truth)
        card = (tmp_path / profile / "README.md").read_text()
        assert (f"base.resize_token_embeddings({rows})" in card) == bool(rows and profile != "merged")
    close(answer(model, tokens), truth)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_in_native_and_merged(bias: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(tmp_path / "base")
    fresh = lambda: BertForSequenceClassification.from_pretrained(tmp_path / "base")  # noqa: E731
    model = adapted(fresh(), target_modules=["query"], task_type="SEQ_CLS", bias=bias)
    for profile in ("native", "merged"):
        done = export(model, tmp_path / profile, profile)
        close(answer(reopened(done, fresh()), ids()), answer(model, ids()))
    with pytest.raises(ExportError, match="bias: trained"):
        export(model, tmp_path / "portable", "portable")


class Config(PretrainedConfig):
    model_type = "normed"


class Normed(PreTrainedModel):
    config_class = Config

    def __init__(self, settings: Config) -> None:
        super().__init__(settings)
        self.a, self.bn, self.b = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        out = self.b(torch.relu(self.bn(self.a(input_ids.float() / 30))))
        loss = None if labels is None else nn.functional.cross_entropy(out, labels)
        return SequenceClassifierOutput(loss=loss, logits=out)


def normed() -> Normed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Normed(Config())


@pytest.mark.parametrize("named", [False, True])
def test_running_statistics_travel_or_are_refused(named: bool, tmp_path: Path) -> None:
    normed().save_pretrained(tmp_path / "base")
    base = Normed.from_pretrained(tmp_path / "base") if named else normed()
    each = trainer(tmp_path / "run", get_peft_model(base, LoraConfig(r=2, target_modules=["a", "b"])), steps=5)
    result = fit(each, WeightLoRA(k=1, select_after=2), measure=False)
    sample = {"input_ids": ids()}
    done = export(result, tmp_path / "native", sample=sample)
    assert any("bn.running_mean: changed by training" in note for note in done.notes)
    assert any("compared on the base in memory" in note for note in done.notes) != named
    again = PeftModel.from_pretrained(normed(), tmp_path / "native")
    close(answer(again, ids()), answer(each.model, ids()))
    with pytest.raises(ExportError, match=r"bn.running_mean.*use profile 'native' or 'merged'.*modules_to_save"):
        export(result, tmp_path / "portable", "portable", sample=sample)


def test_running_statistics_of_a_saved_module_travel_with_it(tmp_path: Path) -> None:
    model = get_peft_model(normed(), LoraConfig(r=2, target_modules=["a"], modules_to_save=["bn", "b"]))
    each = trainer(tmp_path / "run", model, steps=5)
    fit(each, WeightLoRA(k=1, select_after=2), measure=False)
    for profile in ("native", "portable"):
        done = export(each.model, tmp_path / profile, profile, sample={"input_ids": ids()})
        close(answer(reopened(done, normed()), ids()), answer(each.model, ids()))


def test_a_frozen_head_that_was_made_at_random_is_named(folders: dict[bool, Path], tmp_path: Path) -> None:
    base = LlamaForSequenceClassification.from_pretrained(folders[False])  # the file has no such head
    model = adapted(base)
    done = export(model, tmp_path / "native")
    assert any("score.weight: made at random" in note for note in done.notes)
    again = reopened(done, LlamaForSequenceClassification.from_pretrained(folders[False]))
    close(answer(again, ids()), answer(model, ids()))
    with pytest.raises(ExportError, match=r"score.weight: made at random"):
        export(model, tmp_path / "portable", "portable")
    saved = adapted(LlamaForSequenceClassification.from_pretrained(folders[False]), modules_to_save=["score"])
    export(saved, tmp_path / "portable", "portable")


def test_an_adapter_of_another_base_is_refused(folders: dict[bool, Path], tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = adapted(LlamaForCausalLM(config()))
    model.peft_config["default"].base_model_name_or_path = str(folders[False])
    with pytest.raises(ExportError, match=r"most weights of the base differ.*base_model_name_or_path"):
        export(model, tmp_path / "out")
    export(model, tmp_path / "out", "merged")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    assert any("cannot be opened here" in note for note in export(model, tmp_path / "out").notes)


def test_resized_embeddings_are_told_before_training(
    folders: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(opened(folders[False], ROWS))
    attach(model, WeightLoRA(k=1, select_after=2), torch.optim.SGD(model.parameters(), lr=0.1), max_steps=5)
    assert "embeddings of 65 rows, where the base's have 60: use native or merged" in caplog.text
    caplog.clear()
    model = adapted(opened(folders[True]), modules_to_save=["lm_head"])
    attach(model, WeightLoRA(k=1, select_after=2), torch.optim.SGD(model.parameters(), lr=0.1), max_steps=5)
    assert "cannot hold lm_head, which is tied to model.embed_tokens in the base" in caplog.text


@pytest.mark.parametrize(("size", "told"), [(1e-4, True), (1.0, False)])
def test_merging_in_half_precision_says_when_it_rounds_the_adapter_away(
    size: float, told: bool, folders: dict[bool, Path], tmp_path: Path
) -> None:
    base = LlamaForCausalLM.from_pretrained(folders[False], dtype=torch.bfloat16)
    model = warm(get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS)), scale=size)
    notes = export(model, tmp_path / "out", "merged").notes
    assert any("merging rounded the weights by as much as the adapters do" in note for note in notes) == told

"""Models without weights against the same models with them, and the published shapes."""

from __future__ import annotations

import pytest
import torch

from weightlora.errors import ConfigError
from weightlora.tasks import MODELS, load_model
from weightlora.tasks.shapes import PUBLISHED
from weightlora.tasks.skeletons import skeleton

# Parameters as published for the checkpoints: Hugging Face's own counts of the models below their heads.
COUNTS = {"llama-3-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "smollm2"])  # which has tests of its own
def test_a_skeleton_is_the_model(name: str) -> None:
    bones, loaded = skeleton(name), load_model(name, num_labels=2)
    shapes = [{n: (p.shape, p.dtype) for n, p in m.model.named_parameters()} for m in (bones, loaded)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in bones.model.parameters()} == {"meta"}
    assert (bones.heads, bones.linear_targets) == (loaded.heads, loaded.linear_targets)
    assert bones.attention_targets == loaded.attention_targets


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str) -> None:
    built = skeleton(name)
    assert sum(p.numel() for p in built.model.parameters()) == COUNTS[name]
    assert (built.head, built.heads, built.model.dtype) == ("causal-lm", (), torch.bfloat16)


@pytest.mark.parametrize("name", ["bert-tiny-shape", "bart-small-shape", "llama-small-shape", "deberta-v3-small-shape"])
@pytest.mark.parametrize("size", [1, 3])
def test_its_batch_can_be_computed(name: str, size: int) -> None:
    built = skeleton(name, device="cpu")
    with torch.no_grad():
        assert torch.isfinite(built.model(**built.batch(size, 12)).loss)


def test_other_heads_labels_and_dtypes() -> None:
    built = skeleton("llama-small-shape", head="causal-lm", dtype=torch.bfloat16)
    assert built.heads == ()
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}
    assert skeleton("bert-tiny-shape", num_labels=7).model.classifier.out_features == 7
    assert skeleton("bart-large").head == "seq2seq-lm"
    assert skeleton("deberta-v3-base").head == "sequence-classification"
    assert set(PUBLISHED) & set(MODELS) == {"smollm2"}, "what it is can be planned where its weights are not installed"


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"config of model 'robot' cannot be read .*; pass minilm"):
        skeleton("robot")
    with pytest.raises(ConfigError, match="cannot be built with the head 'seq2seq-lm'"):
        skeleton("llama-3-8b", head="seq2seq-lm")

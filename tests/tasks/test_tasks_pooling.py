"""Mean pooling by hand in float64, padding that does not count, and a round trip through files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

from weightlora.tasks import MeanPooledBertConfig, MeanPooledBertForSequenceClassification, load_model
from weightlora.tasks.pooling import masked_mean


def small(**settings: object) -> MeanPooledBertForSequenceClassification:
    config = MeanPooledBertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MeanPooledBertForSequenceClassification(config).double().eval()


IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def test_logits_by_hand() -> None:
    model = small(num_labels=3)
    hidden = model.bert(IDS, attention_mask=MASK).last_hidden_state.detach().numpy()
    pooled = np.stack([hidden[0].mean(axis=0), hidden[1, :2].mean(axis=0)])
    weight, bias = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    logits = pooled @ weight.T + bias
    output = model(IDS, attention_mask=MASK, labels=torch.tensor([2, 0]))
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, rtol=0, atol=1e-13)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = shifted / shifted.sum(axis=1, keepdims=True)
    assert output.loss.item() == pytest.approx(-np.log(chances[[0, 1], [2, 0]]).mean(), abs=1e-13)


@pytest.mark.parametrize("rows", [1, 2])
def test_regression_loss_by_hand(rows: int) -> None:
    model = small(num_labels=1, problem_type="regression")
    targets = torch.tensor([1.5, -2.0], dtype=torch.float64)[:rows]
    output = model(IDS[:rows], attention_mask=MASK[:rows], labels=targets)
    expected = ((output.logits[:, 0] - targets) ** 2).mean()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-14)


def test_padding_neither_counts_nor_gets_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    pooled = masked_mean(hidden, MASK)
    torch.testing.assert_close(pooled, torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]), rtol=0, atol=1e-15)
    pooled.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[1, 2:].abs().sum() == 0
    torch.testing.assert_close(hidden.grad[1, :2], torch.full((2, 3), 0.5, dtype=torch.float64))
    assert masked_mean(hidden, torch.zeros_like(MASK)).abs().sum() == 0  # no token at all: zero, not a division by it
    model = small()
    changed = IDS.clone()
    changed[1, 2:] = 33
    first = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(model(changed, attention_mask=MASK).logits, first, rtol=0, atol=1e-13)
    torch.testing.assert_close(model(IDS[1:, :2]).logits, first[1:], rtol=0, atol=1e-13)  # no mask: all tokens


def test_minilm_equals_sentence_embeddings_below_the_classifier() -> None:
    loaded = load_model("minilm", num_labels=2, dtype=torch.float64)
    model = loaded.model.eval()
    inputs = loaded.tokenizer(["a cat sat", "two dogs ran away from it"], padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(2, 384))
        model.classifier.bias.zero_()
        hidden = model.bert(**inputs).last_hidden_state
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            expected = hidden[row, :length].mean(0)[:2]
            torch.testing.assert_close(model(**inputs).logits[row], expected, rtol=0, atol=1e-12)


def test_minilm_tells_similar_from_dissimilar() -> None:
    """The packaged weights are in their places: the mean-pooled vectors know what sentences mean."""
    loaded = load_model("minilm", num_labels=2)
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    inputs = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model.eval().bert(**inputs).last_hidden_state
    vectors = torch.nn.functional.normalize(masked_mean(hidden, inputs["attention_mask"]), dim=-1)
    similar, dissimilar = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert similar > 0.5
    assert dissimilar < 0.2


def test_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    loaded = load_model("minilm", num_labels=3, labels=("a", "b", "c"))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    inputs = loaded.tokenizer(["one two", "three"], padding=True, return_tensors="pt")
    expected = loaded.model.eval()(**inputs).logits
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MeanPooledBertForSequenceClassification
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(**inputs).logits, expected)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b", 2: "c"}
    by_name = load_model(str(tmp_path), num_labels=3, labels=("a", "b", "c"))
    assert torch.equal(by_name.model.eval()(**inputs).logits, expected)
    assert by_name.heads == ("classifier",)
    assert len(by_name.linear_targets) == 36


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = small(num_labels=2).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            with warnings.catch_warnings():  # renamed in late 5.x; the old name is the one that every 5.x has
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss
        kept.append(sum(sizes))
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert kept[1] < kept[0] / 2
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-14)


def test_tuple_and_hidden_states() -> None:
    model = small(num_labels=2)
    output = model(IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    (logits,) = model(IDS, attention_mask=MASK, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert not isinstance(AutoConfig.for_model("bert"), MeanPooledBertConfig)
    assert issubclass(MeanPooledBertConfig, BertConfig)

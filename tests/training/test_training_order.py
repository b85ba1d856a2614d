"""Rows come over the seam as if it were not there: the stock trainer, which has none, is the truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import a_third, adapter_state, examples, lora, max_difference, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler
from transformers import Trainer

from weightlora.methods import LoRA, WeightLoRA
from weightlora.training import fit

ROWS = 36  # nine batches of four
METHOD = WeightLoRA(k=1.0, select_after=5)  # the seam changes no adapter


class Noting(Trainer):
    """Notes which rows it trains on; ``kind`` says what loads them."""

    kind = "trainer's own"
    generator: torch.Generator
    sampler: Any

    def get_train_dataloader(self) -> DataLoader[Any]:  # noqa: PLR0911 - one per kind
        rows: Any = self.train_dataset
        settings: dict[str, Any] = {"batch_size": 4, "collate_fn": self.data_collator}
        if self.kind == "shuffled":
            return DataLoader(rows, shuffle=True, **settings)
        if self.kind == "drop_last":
            return DataLoader(rows, shuffle=True, drop_last=True, **settings)
        if self.kind == "workers":
            return DataLoader(rows, shuffle=True, num_workers=1, **settings)
        if self.kind == "weighted":
            drawn = WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)
            return DataLoader(rows, sampler=drawn, **settings)
        if self.kind == "weighted, prepared":
            drawn = WeightedRandomSampler([1.0 + i for i in range(ROWS)], ROWS)
            return self.accelerator.prepare(DataLoader(rows, sampler=drawn, **settings))
        if self.kind == "a generator of one's own":
            return DataLoader(rows, shuffle=True, generator=torch.Generator().manual_seed(3), **settings)
        if self.kind == "a sampler with state":
            return DataLoader(rows, sampler=Turning(ROWS), **settings)
        return super().get_train_dataloader()

    def training_step(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Tensor:
        seen = vars(self).setdefault("seen", [])
        seen.extend(row["id"] for ids in inputs["input_ids"] for row in KNOWN if torch.equal(row["input_ids"], ids))
        return super().training_step(model, inputs, *given, **named)


class Turning(Sampler[int]):
    """Begins every epoch where the last one was left."""

    def __init__(self, count: int) -> None:
        self.count, self.next = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.count):
            self.next = (self.next + 7) % self.count
            yield self.next


class Stream(IterableDataset[dict[str, Any]]):
    """Without a length; begins anew with each iterator."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


KNOWN = [{**row, "id": index} for index, row in enumerate(examples(ROWS))]
PLAIN = examples(ROWS)


def made(out: Path, kind: str, **arguments: Any) -> Any:
    rows: Any = Stream(PLAIN[:12]) if kind == "a stream of three batches" else PLAIN
    torch.manual_seed(11)
    return trainer(
        out,
        lora(layers=1),
        cls=type("Trained", (Noting,), {"kind": kind}),
        data=rows,
        **{"logging_steps": 1, "steps": 20, **arguments},
    )


KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "shuffled": ("shuffled", 5, {}),
    "two epochs": ("shuffled", 13, {}),
    "end of an epoch": ("shuffled", 9, {}),
    "weighted": ("weighted", 5, {}),
    "prepared": ("weighted, prepared", 5, {}),
    "own generator": ("a generator of one's own", 13, {}),
    "own generator, end": ("a generator of one's own", 9, {}),
    "state": ("a sampler with state", 5, {}),
    "state, end": ("a sampler with state", 9, {}),
    "workers": ("workers", 5, {"steps": 12}),
    "drop_last": ("drop_last", 5, {"steps": 12}),
    "stream": ("a stream of three batches", 5, {"steps": 12}),
    "stream, end": ("a stream of three batches", 6, {"steps": 12}),
    "accumulation": ("shuffled", 3, {"gradient_accumulation_steps": 2, "steps": 8}),
    "no skip": ("trainer's own", 5, {"ignore_data_skip": True}),
}


@pytest.mark.parametrize("name", a_third(KINDS, first=0))
def test_rows_come_as_without_a_seam(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, seam, arguments = KINDS[name]
    stock, ours = made(tmp_path / "a", kind, **arguments), made(tmp_path / "b", kind, **arguments)
    torch.manual_seed(5)
    stock.train()
    torch.manual_seed(5)
    before = vars(ours).keys()
    fit(ours, WeightLoRA(k=1.0, select_after=seam), engine="stock", measure=False)
    assert ours.seen == stock.seen
    assert max_difference(adapter_state(stock.model), adapter_state(ours.model)) == 0.0
    assert ours.args.ignore_data_skip == stock.args.ignore_data_skip
    assert "get_train_dataloader" not in before
    assert "get_train_dataloader" not in vars(ours)
    assert "draws the epoch's order anew" not in caplog.text


def test_a_collator_that_draws_goes_on_as_without_a_seam(tmp_path: Path) -> None:
    """Random numbers flow through reading and training alike."""

    def run(out: Path) -> Any:
        one = made(out, "shuffled")
        collate = one.data_collator

        def masking(rows: list[Any]) -> dict[str, Any]:
            found = dict(collate(rows))
            found["attention_mask"] = (torch.rand(found["input_ids"].shape) > 0.2).long()
            return found

        one.data_collator = masking
        return one

    stock, ours = run(tmp_path / "a"), run(tmp_path / "b")
    torch.manual_seed(5)
    stock.train()
    torch.manual_seed(5)
    fit(ours, METHOD, engine="stock", measure=False)
    assert max_difference(adapter_state(stock.model), adapter_state(ours.model)) == 0.0


@pytest.mark.parametrize(
    ("kind", "how", "left"),
    [("shuffled", "resumed", 36 - 20), ("shuffled", "split", 36 - 20), ("trainer's own", "resumed", None)],
)
def test_an_order_that_cannot_be_found_again_is_told(
    kind: str, how: str, left: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """How many rows are left of the epoch is in the line; an order that follows from the seed is found, and no line."""
    after = 2 if how == "split" else None
    result = fit(made(tmp_path, kind, steps=9), METHOD, measure=False, final_micro_batch=after)
    assert result.seam_step == 5
    if how == "resumed":
        assert "anew" not in caplog.text
        fit(made(tmp_path / "b", kind, steps=9), METHOD, resume=tmp_path / "seam-5", measure=False)
    told = [r.getMessage() for r in caplog.records if "draws the epoch's order anew at step 5" in r.getMessage()]
    assert len(told) == (left is not None)
    assert not told or f"of the {left} rows that are left" in told[0]


def test_a_plain_resume_tells_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: Any = {"steps": 9, "save_strategy": "steps", "save_steps": 5}
    fit(made(tmp_path, "shuffled", **settings), LoRA(), measure=False)
    fit(made(tmp_path / "b", "shuffled", **settings), LoRA(), resume=tmp_path / "checkpoint-5", measure=False)
    assert "RandomSampler draws the epoch's order anew at step 5" in caplog.text


def test_resuming_without_skipping_is_the_users_wish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An epoch that began anew in warm-up ends where it would have: what is left out is said."""
    settings: Any = {"steps": 9, "save_strategy": "steps", "save_steps": 2, "ignore_data_skip": True}
    fit(made(tmp_path, "trainer's own", **settings), METHOD, measure=False)
    again = made(tmp_path / "b", "trainer's own", **settings)
    fit(again, METHOD, resume=tmp_path / "checkpoint-2", measure=False)
    assert again.state.global_step == 9
    assert "8 of its rows are left out" in caplog.text


def test_a_resumed_warm_up_leaves_nothing_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a resumed run skips of its epoch was read by the process before it."""
    settings: Any = {"steps": 9, "save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path, "trainer's own", **settings)
    fit(whole, METHOD, measure=False)
    again = made(tmp_path / "b", "trainer's own", **settings)
    fit(again, METHOD, resume=tmp_path / "checkpoint-2", measure=False)
    assert "left out" not in caplog.text
    assert max_difference(adapter_state(whole.model), adapter_state(again.model)) == 0.0

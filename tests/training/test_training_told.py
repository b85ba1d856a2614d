"""What ``fit`` says of its decisions: beside the losses, once, and not where it is not wanted."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.builders import trainer
from torch import nn
from transformers import PrinterCallback, Trainer
from transformers.utils import logging as transformers_logging

from weightlora.graft.adapters import adapters
from weightlora.methods import WeightLoRA, WeightLoRAPlus
from weightlora.training import fit
from weightlora.training.told import SLOW, beside_the_losses, log, tell_slow_bfloat16


@pytest.fixture(autouse=True)
def _not_set_up() -> Iterator[None]:
    """The command line, which other tests call in this process, sets levels."""
    own, verbosity = log.level, transformers_logging.get_verbosity()
    log.setLevel(logging.NOTSET)
    transformers_logging.set_verbosity_warning()
    yield
    log.setLevel(own)
    transformers_logging.set_verbosity(verbosity)


class Follower(Trainer):
    """As on a process beside the main one."""

    def is_world_process_zero(self) -> bool:
        return False


def learning(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)


def said(made: Trainer) -> None:
    with beside_the_losses(made):
        log.info("a decision")
        log.warning("a warning")
    assert (log.level, log.filters) == (logging.NOTSET, []), "left as it was"


def test_decisions_stand_beside_the_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(trainer(tmp_path, steps=4, disable_tqdm=False), WeightLoRA(k=2, select_after=2))
    out = capsys.readouterr().out
    lines = ("6 adapters train until step 2 of 4; then 2 stay", "with all of them, ", "kept 2 of 6", "with these, ")
    assert all(out.count(line) == 1 for line in lines), out
    places = [out.index(line) for line in lines]
    assert places == sorted(places)
    assert places[1] < out.index("'loss'") < places[2], "the loss of step 2 comes before the seam"


def test_growth_says_what_it_comes_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, steps=4, disable_tqdm=False)
    before, learned = adapters(made.model), learning(made.model)
    fit(made, WeightLoRAPlus(k=2, select_after=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("their rank goes ")]
    old, new, after, all_n = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\b", line))
    grown = adapters(made.model)
    assert (old, new) == (before[0].rank, grown[0].rank)
    assert (after, all_n) == (learning(made.model), learned)
    assert new > old


def test_warnings_go_where_they_always_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path)
    made.add_callback(PrinterCallback)  # prints losses where there is no bar
    said(made)
    assert capsys.readouterr().out == "a decision\n"
    assert caplog.messages == ["a warning"]


@pytest.mark.parametrize("why", ["no losses are printed", "not the main process", "verbosity", "log_level"])
def test_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str], why: str) -> None:
    kind = Follower if why == "not the main process" else Trainer
    level = {"log_level": "error"} if why == "log_level" else {}
    made = trainer(tmp_path, disable_tqdm=why == "no losses are printed", cls=kind, **level)
    if why == "verbosity":
        transformers_logging.set_verbosity_error()
    said(made)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("whose", ["weightlora", None])
def test_where_logging_is_set_up_lines_come_there_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, whose: str | None
) -> None:
    with caplog.at_level(logging.INFO, logger=whose), beside_the_losses(trainer(tmp_path, disable_tqdm=False)):
        log.info("a decision")
    assert caplog.messages == ["a decision"]
    assert capsys.readouterr().out == ""


def test_a_level_of_its_own_is_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="weightlora"),
        beside_the_losses(trainer(tmp_path, disable_tqdm=False)),
    ):
        log.info("a decision")
    assert caplog.messages == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("bf16", "dtype", "change"),
    [
        (False, torch.float32, ""),
        (True, torch.float32, "; set bf16=False"),
        (False, torch.bfloat16, "; load the base in float32 (--dtype float32)"),
        (True, torch.bfloat16, "; set bf16=False and load the base in float32 (--dtype float32)"),
    ],
)
@pytest.mark.parametrize("times", [1.5, 60.4])
def test_a_processor_that_is_slow_in_bfloat16_is_named(
    bf16: bool,
    dtype: torch.dtype,
    change: str,
    times: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weightlora.training.told.slower_in_bfloat16", lambda: times)
    made = trainer(tmp_path, bf16=bf16)
    made.model.to(dtype)  # type: ignore[union-attr]
    tell_slow_bfloat16(made)
    said = f"this processor takes 60 times as long for a backward product in bfloat16 as in float32{change}"
    assert [record.getMessage() for record in caplog.records] == [said] * bool(change and times > SLOW)

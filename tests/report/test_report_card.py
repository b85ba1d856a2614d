"""The section of a model card that a run's record gives."""

from __future__ import annotations

from collections.abc import Callable

from weightlora.report import card_section
from weightlora.runs.record import Record

Make = Callable[..., Record]


def test_metrics_and_costs_are_the_records(make: Make) -> None:
    text = card_section(make(metrics={"accuracy": 0.8922, "loss": 0.3}))
    assert text.startswith("## What the run measured\n\nOn the validation rows of `sst2`, seed 0:")
    assert "`accuracy` 0.8922, `loss` 0.3000." in text
    assert "|  | warmup | final | change |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| kept activations | 1545.0 MiB | 455.0 MiB | 3.40x less |" in text
    assert text.endswith("|\n")


def test_a_record_without_numbers_gives_no_section(make: Make) -> None:
    assert card_section(make(metrics={}, phases=())) == ""
    assert "accuracy" in card_section(make(phases=()))
    assert "accuracy" not in card_section(make(metrics={}))


def test_words_stay_in_their_code_spans(make: Make) -> None:
    text = card_section(make(task="a`b\n# c", metrics={"x` <b>": 1.0}, phases=()))
    assert text.splitlines()[2] == "On the validation rows of `a'b # c`, seed 0: `x' <b>` 1.0000."

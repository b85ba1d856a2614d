"""The example report of the documents is what today's code makes of the demo's records, which are stored here."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightlora.report import report

EXAMPLE = Path(__file__).parent / "example"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "example-report.html"


def test_the_example_page_is_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, in tests/report/example: ``weightlora report runs/demo --out ../../../docs/example-report.html``."""
    monkeypatch.chdir(EXAMPLE)
    assert report(["runs/demo"]).html == PAGE.read_text(encoding="utf-8")

"""Every row of docs/families.md, run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.builders import a_third
from tests.families import FAMILIES, PAGE, Story, notes, row


@pytest.mark.parametrize("title", a_third(FAMILIES, first=1))
def test_a_family_does_what_the_page_says(title: str, tmp_path: Path) -> None:
    family = FAMILIES[title]
    cells = Story(family, tmp_path).tell()
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert row(family, cells) in lines, "run python -m tests.families"
    assert set(notes(cells)) <= set(lines)


def test_the_page_has_these_families_and_no_other() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [cells[0] for cells in table[1:]] == list(FAMILIES)
    assert {cell for cells in table[1:] for cell in cells[3:]} == {"yes", "refused"}

"""The placement table's parts: how sets are drawn, and how a score is judged by them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchlib.judging import load, partial, value
from benchlib.verdicts import (
    DECIDING_SEEDS,
    GROWN,
    SAME_PARAMETERS,
    SAME_WORK,
    judge,
    noise,
    paired,
    said,
    show,
    show_over_grounds,
)
from placement import RATES, random_sets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ("smollm2-sst2", "smollm2-gsm8k-float32", "minilm-sst2", "minilm-docstrings")  # with random sets
GROUNDS = (*TABLES, "minilm-sst2-long", "minilm-docstrings-long", "minilm-docstrings-longest", "smollm2-gsm8k")

# A difference with its interval, its p and that by Holm, which end a row.
DIFFERENCE = re.compile(r" \| \**[+-][\d.]+ ± [\d.]+\** \| (< )?[\d.]+ \| (< )?[\d.]+ \|$")

BLOCKS = [i // 7 for i in range(210)]
KINDS = [str(i % 7) for i in range(210)]


def test_sets_are_spread_and_every_other_has_a_lowest_block() -> None:
    sets = random_sets(BLOCKS, KINDS, 60)
    assert sets == random_sets(BLOCKS, KINDS, 60)
    assert all(chosen == sorted(set(chosen)) and 1 <= len(chosen) <= 84 for chosen in sets)
    large = [chosen for chosen in sets[::2] if len(chosen) >= 21]
    assert large
    assert all({KINDS[i] for i in chosen} == set(KINDS) for chosen in large)
    lowest = {number: min(BLOCKS[i] for i in chosen) for number, chosen in enumerate(sets)}
    assert np.mean([lowest[n] for n in range(1, 60, 2)]) > np.mean([lowest[n] for n in range(0, 60, 2)])


def test_what_is_known_already_is_no_merit_of_a_score() -> None:
    draw = np.random.default_rng(0)
    known, noise, news = (draw.normal(size=80) for _ in range(3))
    loss = -known - news
    idle = partial(loss, known + noise, known[:, None], draws=200)
    assert idle.low < 0 < idle.high
    telling = partial(loss, known + news, known[:, None], draws=200)
    assert telling.high < -0.5
    assert telling.low <= telling.correlation <= telling.high


def test_a_spread_value_is_the_sum_of_roots_over_blocks() -> None:
    assert value([4.0, 5.0, 9.0, -1.0], [0, 1, 2, 3], [0, 0, 1, 2]) == pytest.approx(17)
    assert value([4.0, 5.0, 9.0, -1.0], [0, 1, 2, 3], [0, 0, 1, 2], spread=True) == pytest.approx(6)


@pytest.mark.parametrize("ground", TABLES)
def test_the_stored_tables_can_be_loaded(ground: str) -> None:
    sets, scores, adapters = load(str(RESULTS / f"placement-{ground}.json"))
    count = 210 if ground.startswith("smollm2") else 36
    assert len(sets) == 60
    assert {len(values) for values in scores.values()} == {len(adapters)} == {count}
    names = {a["name"]: i for i, a in enumerate(adapters)}
    assert [names[a["name"]] for a in adapters] == list(range(count))
    blocks, kinds = [a["block"] for a in adapters], [a["kind"] for a in adapters]
    assert [one["set"] for one in sets] == random_sets(blocks, kinds, 60)
    assert {(one["seed"], one["rate"]) for one in sets} == {(1, results(ground)["rate"])}


def results(ground: str, judged: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"placement-{judged}{ground}.json").read_text())
    return found


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_verdicts_are_those_of_the_trials(ground: str) -> None:
    """All but the intervals, whose bootstrap takes minutes."""
    found, stored = judge(RESULTS / f"placement-{ground}.json", draws=2), results(ground, "judged-")
    for key in ("partial", "beyond evenness"):
        here, there = ({name: v["correlation"] for name, v in one.pop(key, {}).items()} for one in (found, stored))
        assert here == pytest.approx(there, abs=1e-9)
        assert len(here) > 25 or ground not in TABLES
    assert found == stored


def test_the_evidence_says_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Every score, every difference with its interval, and every verdict."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    scores: set[str] = set()
    for ground in GROUNDS:
        judged = results(ground, "judged-")
        show(judged, results(ground))
        for key in ("partial", "beyond evenness"):
            scores |= {said(one) for one in judged.get(key, {}).values()}
    data = [results(ground) for ground in GROUNDS]
    show_over_grounds(data)
    printed = capsys.readouterr().out
    in_tables = [line for line in page.splitlines() if line.startswith("|")]
    found = [cell for line in in_tables for cell in re.findall(r"[+-]\d\.\d\d \([^)]* to [^)]*\)", line)]
    assert len(found) > 60
    assert set(found) <= scores
    rows = [re.search(r"\d\.\d{4} \| [+-]\d\.\d{4} ± \d\.\d{4} \| \d\.\d{3}", line) for line in in_tables]
    told = [row[0] for row in rows if row]
    assert len(told) > 30
    assert [row for row in told if row not in printed] == []
    stated = [DIFFERENCE.search(line) for line in in_tables]
    rows_stated = [row[0] for row in stated if row]
    verdicts = [row[0] for line in printed.splitlines() if (row := DIFFERENCE.search(line))]
    assert sorted(rows_stated) == sorted(verdicts)
    assert len(verdicts) > 3 * len(GROUNDS)


# A row of the README: the ground, and the sets that it compares.
HEADLINE = {
    "SmolLM2-135M, SST-2: 76 of 210": ("smollm2-sst2", "half kept, credit"),
    "SmolLM2-135M, GSM8K: 89 of 210": ("smollm2-gsm8k", "half kept, credit"),
    "the same, GSM8K, with LoRA's parameters": ("smollm2-gsm8k", GROWN[0]),
    "the same, GSM8K, ranks raised, for as many operations": ("smollm2-gsm8k-float32", SAME_WORK[0]),
    "the same, docstrings, ranks raised, for as many operations": ("minilm-docstrings-long", SAME_WORK[0]),
    "MiniLM, SST-2: 17 of 36": ("minilm-sst2", "half kept, credit"),
    "the same, SST-2, trained half": ("minilm-sst2-long", "half kept, credit"),
    "MiniLM, docstrings: 17 of 36": ("minilm-docstrings", "half kept, credit"),
    "the same, docstrings, with LoRA's parameters": ("minilm-docstrings", GROWN[0]),
    "the same, 17 of 36 by chance": ("minilm-docstrings", "half kept, chance"),
    "the same, a head alone": ("minilm-docstrings", "none, head rate 0.005"),
}


@pytest.mark.parametrize("row", HEADLINE)
def test_the_readme_says_what_the_results_say(row: str) -> None:
    ground, label = HEADLINE[row]
    data = results(ground)
    gap, half, _ = paired(data, label, "all")
    (line,) = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if row in line]
    said = [float(number) for number in re.findall(r"[+-]\d\.\d{3}", line)]
    assert said == pytest.approx([gap, gap - half, gap + half], abs=0.0006)
    one, whole = (next(t for t in data["trials"] if (t["label"], t["seed"]) == (name, 1)) for name in (label, "all"))
    assert f"| {one['kept'] / whole['kept']:.2f}x |" in line
    chosen = one["set"]
    counts = re.search(r"(\d+) of (\d+)", line)
    assert counts is None or [*map(int, counts.groups())] == [len(chosen), len(data["adapters"])]


def test_a_table_of_sets_alone_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is after the first stages, when nothing has been trained with several seeds."""
    data = results("minilm-docstrings")
    data["trials"] = [t for t in data["trials"] if t["seed"] == 1 and t["label"].startswith(("random ", "all"))]
    show(results("minilm-docstrings", "judged-"), data)
    assert "of seeds nan" in capsys.readouterr().out


def test_the_evidence_says_how_much_of_each_table_is_noise() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    found = [noise(results(ground)) for ground in TABLES]
    assert f"random sets | {' | '.join(f'{of_sets:.3f}' for of_sets, _ in found)} |" in page
    assert f"three or more | {' | '.join(f'{of_seeds:.3f}' for _, of_seeds in found)} |" in page
    shares = [f"{of_seeds**2 / of_sets**2:.0%}" for of_sets, of_seeds in found]
    assert f"that is noise | {' | '.join(shares)} |" in page


def test_the_evidence_says_what_growth_came_to() -> None:
    """Means over the seeds, row by row."""
    rows = json.loads((RESULTS / "growth-docstrings.json").read_text())["rows"]
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    loss = {(one["method"], one["seed"]): one["eval_loss"] for one in rows}
    for method in ("weightlora+", "weightlora", "lora"):
        own = [one for one in rows if one["method"] == method]
        accuracy, nats = (np.mean([one[key] for one in own]) for key in ("accuracy", "eval_loss"))
        (line,) = re.findall(rf"^\| `{re.escape(method)}` \| \d+ of 36 \|.*$", page, re.MULTILINE)
        assert f"| {accuracy:.4f} | {nats:.4f} |" in line
        assert f"| {own[0]['adapters']} of 36 | {own[0]['ranks'][0]} |" in line
    gaps = [loss["weightlora+", seed] - loss["weightlora", seed] for seed in range(1, 6)]
    assert max(gaps) < 0
    assert f"`weightlora+` minus `weightlora`: {np.mean(gaps):+.4f} ± " in page


def test_scores_agree_between_the_two_precisions_of_gsm8k() -> None:
    coarse, fine = (load(str(RESULTS / f"placement-{g}.json"))[1] for g in ("smollm2-gsm8k", "smollm2-gsm8k-float32"))
    found = [float(stats.spearmanr(coarse[name], fine[name])[0]) for name in fine]
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert f"scores agree between them (Spearman {min(found):.2f} to {max(found):.2f})" in page


# A row of GSM8K's table at equal parameters.
EQUAL_ROWS = {
    "credit's 52": "quarter, credit",
    "integrated gates, as many parameters": f"{SAME_PARAMETERS}, integrated gates",
    "chance, as many parameters": f"{SAME_PARAMETERS}, chance",
    "even, as many parameters": f"{SAME_PARAMETERS}, even",
}


@pytest.mark.parametrize("row", EQUAL_ROWS)
def test_the_evidence_says_what_each_seed_came_to_at_equal_parameters(row: str) -> None:
    data = results("smollm2-gsm8k-float32")
    mine = sorted((t for t in data["trials"] if t["label"] == EQUAL_ROWS[row]), key=lambda t: int(t["seed"]))
    assert [t["seed"] for t in mine] == [1, 2, 3, 4, 5]
    nats, right = (np.mean([t[key] for t in mine]) for key in ("nats", "accuracy"))
    each = " ".join(f"{t['nats']:.4f}"[1:] for t in mine)
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith(f"| {row} | 5 |")]
    assert [line.endswith(f"| {nats:.4f} | {right:.3f} | {each} |") for line in lines].count(True) == 1


# The columns of seeds in the table at the operations of LoRA on all.
WORK = {
    "MiniLM, docstrings": "minilm-docstrings-long",
    "MiniLM, SST-2": "minilm-sst2-long",
    "SmolLM2, GSM8K, float32": "smollm2-gsm8k-float32",
}


@pytest.mark.parametrize("row", WORK)
def test_the_evidence_says_what_each_seed_came_to_at_equal_operations(row: str) -> None:
    data = results(WORK[row])
    counts, steps = data["operations"], data["settings"]["steps"]
    longer = steps * counts["all"] // counts[GROWN[0]]
    columns = []
    for label in ("all", GROWN[0], SAME_WORK[0]):
        mine = {t["seed"]: t for t in data["trials"] if t["label"] == label and t["rate"] == data["rate"]}
        assert {t.get("steps", steps) for t in mine.values()} == {longer if label == SAME_WORK[0] else steps}
        columns.append(" ".join(f"{mine[seed]['nats']:.4f}"[1:] for seed in (1, 2, 3, 4, 5)))
    gap, half, count = paired(data, *GROWN)
    assert count == 5
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    share = f"{counts[GROWN[0]] / counts['all']:.2f}x"
    cells = (row, share, f"{steps}, {longer}", *columns, f"{gap:+.4f} ± {half:.4f}")
    assert f"| {' | '.join(cells)} |" in page


# Rows of the table of rates.
BY_TRAINING_ROWS = {
    "MiniLM, docstrings": "minilm-docstrings",
    "MiniLM, SST-2": "minilm-sst2",
    "SmolLM2, SST-2, in float32": "smollm2-sst2-float32",
    "SmolLM2, GSM8K, in float32": "smollm2-gsm8k-float32",
}


@pytest.mark.parametrize("row", BY_TRAINING_ROWS)
def test_the_evidence_says_what_held_out_training_rows_choose(row: str) -> None:
    data = results(BY_TRAINING_ROWS[row])
    tried = [t for t in data["trials"] if t["label"] == "all, judged on training rows"]
    cells = []
    for rate in RATES:
        nats = [t["nats"] for t in sorted(tried, key=lambda t: int(t["seed"])) if t["rate"] == rate]
        said = " ".join(f"{each:.3f}"[1:] for each in nats)
        cells.append(f"**{said}**" if rate == data["rate by training rows"] else said)
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert f"| {row}, judged on training rows | {' | '.join(cells)} |" in page
    assert data["rate by training rows"] == data["rate"], "the rate that the judged rows chose"


@pytest.mark.parametrize(
    ("ground", "sentence"),
    [
        ("minilm-docstrings", "by {change:+.3f} after 150 steps (seeds: {seeds:.3f})"),
        ("minilm-docstrings-long", "by {change:+.3f} after 300 ({seeds:.3f})"),
        ("minilm-docstrings-longest", "by {change:+.3f} after 450 ({seeds:.3f}; two seeds)"),
        (
            "minilm-sst2-long",
            "by {change:+.3f} nats on MiniLM's SST-2 (225 steps), where its seeds differ by a standard deviation of "
            "{seeds:.3f}",
        ),
        ("smollm2-sst2", "by {change:+.3f} on SmolLM2's, where they differ by {seeds:.3f}"),
        ("smollm2-gsm8k-float32", "by {change:+.3f} in the one seed that was tried, where seeds differ by {seeds:.3f}"),
    ],
)
def test_the_evidence_says_how_much_more_training_changes(ground: str, sentence: str) -> None:
    data = results(ground)
    change, _, _ = paired(data, "all, half as many steps more", "all")
    usual = {t["seed"]: t["nats"] for t in data["trials"] if (t["label"], t["rate"]) == ("all", data["rate"])}
    seeds = np.std([usual[seed] for seed in DECIDING_SEEDS if seed in usual], ddof=1)
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert sentence.format(change=change, seeds=seeds) in " ".join(page.split())

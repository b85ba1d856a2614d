"""A run that is killed anywhere and resumed ends with the adapter of the run that was not, byte for byte."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.builders import long
from tests.runs.commands import TINY, read, weightlora
from tests.runs.killer import SAVED, STATE, Kill, Killer, differences, outcome, saved_before

from weightlora.training.identity import IN_USE

STEPS = 8
# Methods whose own schedules need more: 8 batches to see (two), 8 rounds, 9 rounds of growth, 4 rounds of 4 clients.
# Those that are not killed here are killed by benchmarks/kills.py.
LONGER = {"gradient": 10, "domlora": 10, "alora": 16, "increlora": 16, "flexlora": 16}
# One of each kind: no adapters, ranks that fall by PEFT's own tuner, ranks that grow, rows held out, gates to the end.
OF_EVERY_KIND = (*long("full"), "adalora", *long("increlora", "flexora", "official"))


@pytest.fixture
def flags(small_data: Path) -> list[str]:
    """8 steps, 15 to an epoch, a checkpoint every second step. A constant rate, so that a step too many shows."""
    schedule = ["--max-steps", str(STEPS), "--save-steps", "2", "--logging-steps", "1"]
    rate = ["--lr-scheduler-type", "constant", "--learning-rate", "1e-2"]
    return ["--task", "sst2", "--data-dir", str(small_data), *TINY, *schedule, *rate]


Undisturbed = Callable[[Sequence[str]], tuple[list[str], dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The events of a command that nobody kills, and what it came to."""

    @functools.cache
    def run(flags: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
        out = tmp_path_factory.mktemp("undisturbed") / "whole"
        (whole,) = killer.life(out, list(flags), [])
        return whole["events"], outcome(out)

    return lambda flags: run(tuple(flags))


def progress(events: list[str]) -> list[str]:
    """The steps among events, and the checkpoints that became whole between them."""
    return [label for label in events if label == "step" or SAVED.match(label)]


def chain(events: list[str], share: float) -> list[int]:
    """Points to be killed at, one after the other, each after another checkpoint than the one before.

    What a resumed process does thus reaches a checkpoint before the next one begins, and so the end. Each point lies
    that share of the way from one checkpoint to the next.
    """
    finished = max(number for number, label in enumerate(events, start=1) if label.startswith("os.rename .record.json"))
    points = [n for n in range(3, finished + 1) if not events[n - 1].startswith("os.mkdir")]
    between: dict[int, list[int]] = {}
    for number in points:
        between.setdefault(saved_before(events, number), []).append(number)
    return [each[int(share * len(each))] for each in between.values()]


def killed_in_turn(events: list[str], points: list[int]) -> list[Kill]:
    """The kills that end one life at those events of an undisturbed one."""
    kills: list[Kill] = [("", points[0], 0.0)]
    steps = [number for number, label in enumerate(events, start=1) if label == "step"]
    for before, point in pairwise(points):
        done = sum(number <= point for number in steps)
        kills.append((f"+{done - saved_before(events, before)}", point - steps[done - 1], 0.0))
    return kills


# Chosen by omega, and by credit with growth after it.
METHODS = {
    "paper": ["--method", "weightlora", "--preset", "paper", "--k", "3", "--select-after", "4"],
    "weightlora+": ["--method", "weightlora+", "--k", "0.25", "--select-after", "4"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [*long(("paper", 0.3)), ("weightlora+", 0.5)])
def test_killed_at_any_event_it_ends_with_the_same_adapter(
    killer: Killer, undisturbed: Undisturbed, flags: list[str], tmp_path: Path, name: str, share: float
) -> None:
    """SIGKILL inside surgery and the seam's checkpoint, in others, in the final files: five in one run's life.

    After each, as many steps are done again as there were since the last checkpoint.
    """
    flags = [*flags, *METHODS[name]]
    events, expected = undisturbed(flags)
    assert expected["status"] == "ok"
    points = chain(events, share)
    tries = killer.life(tmp_path / "killed", flags, killed_in_turn(events, points))
    assert [one["signal"] for one in tries] == [signal.SIGKILL] * 5 + [None]
    died = [one["events"][-1] for one in tries[:-1]]
    assert differences(outcome(tmp_path / "killed"), expected) == [], f"killed at events {points} ({', '.join(died)})"
    begun = [0, *(saved_before(events, number) for number in points)]
    for start, point, one in zip(begun, [*points, len(events)], tries, strict=True):
        wanted = progress(events[: point - 1])
        since = next((n for n, x in enumerate(wanted, 1) if start and x.endswith(f"-{start}/{STATE}")), 0)
        assert progress(one["events"][:-1]) == wanted[since:], f"from step {start} on"
    assert any(".seam-4" in label for label in died)
    assert any(label.partition(" ")[2].startswith(".") for label in died), "in the final files"


@pytest.mark.long
def test_killed_again_and_again_in_the_middle_of_things(
    killer: Killer, undisturbed: Undisturbed, flags: list[str], tmp_path: Path
) -> None:
    """Several deaths in one run, milliseconds after an event: in a backward pass, or in a file while it is written."""
    flags = [*flags, *METHODS["weightlora+"]]
    kills: list[Kill] = [
        ("step", 3, 0.004),
        ("open checkpoints/checkpoint-4", 1, 0.006),
        ("open checkpoints/.seam-4", 2, 0.002),
        ("os.rename checkpoints/.seam-4", 1, 0.0),
        ("step", 1, 0.008),
        ("open checkpoints/checkpoint-8/trainer_state.json", 1, 0.0005),
        ("open .adapter", 1, 0.001),
    ]
    tries = killer.life(tmp_path / "killed", flags, kills)
    assert len(tries) == len(kills) + 1
    assert differences(outcome(tmp_path / "killed"), undisturbed(flags)[1]) == []
    left = [path.name for path in (tmp_path / "killed").rglob(".*") if path.name != IN_USE]
    assert left == [], "temporary files of dead processes are left"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_a_method_of_every_other_kind_resumes_too(killer: Killer, flags: list[str], tmp_path: Path, name: str) -> None:
    """Killed in a checkpoint, and when all steps are done; in the final files all are alike.

    Trainers with every method are resumed in tests/methods, commands with every method killed by benchmarks/kills.py.
    """
    method = ["weightlora", "--preset", "official", "--k", "3"] if name == "official" else [name, "--k", "3"]
    last = LONGER.get(name, STEPS)
    flags = [*flags, "--method", *method, "--max-steps", str(last)]
    killer.life(tmp_path / "whole", flags, [])
    kills: list[Kill] = [
        ("open checkpoints/checkpoint-4/trainer_state.json", 1, 0.0),
        (f"os.rename checkpoints/checkpoint-{last}/.checksums.json", 1, 0.02),
    ]
    tries = killer.life(tmp_path / "killed", flags, kills)
    assert len(tries) == len(kills) + 1
    assert tries[-1]["events"].count("step") == 0, "all steps were done and stored"
    assert differences(outcome(tmp_path / "killed"), outcome(tmp_path / "whole")) == []


@pytest.mark.long
def test_minilm_is_trained_killed_resumed_and_exported(killer: Killer, small_data: Path, tmp_path: Path) -> None:
    """The pretrained model, the whole way: train, die, resume, export, and open the export with stock PEFT."""
    flags = ["--task", "sst2", "--data-dir", str(small_data), "--model", "minilm", "--max-length", "16", "--k", "9"]
    flags += ["--max-steps", "12", "--select-after", "4", "--save-steps", "3", "--per-device-train-batch-size", "4"]
    killer.life(tmp_path / "whole", flags, [])
    tries = killer.life(tmp_path / "run", flags, [("step", 4, 0.0), ("step", 4, 0.01)])
    assert [one["events"].count("step") for one in tries] == [4, 4, 6]
    expected = outcome(tmp_path / "whole")
    assert differences(outcome(tmp_path / "run"), expected) == []
    assert len(expected["kept"]) == 9
    for profile in ("portable", "merged"):
        assert weightlora("export", tmp_path / "run", "--profile", profile, "--out", tmp_path / profile) == 0
        facts = read(tmp_path / profile / "export.json")
        assert facts["max_difference"] <= facts["tolerance"] <= 1e-4
    config = read(tmp_path / "portable" / "adapter_config.json")
    assert config["lora_alpha"] == config["r"]
    assert not config["modules_to_save"]

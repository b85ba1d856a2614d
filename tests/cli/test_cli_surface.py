"""What is seen of the command line from outside: lazy imports, versions, help, exit codes and progress in processes."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, weightlora
from tests.runs.killer import Killer

from weightlora import __version__

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "matplotlib", "sklearn")
COMMANDS = (
    "train", "resume", "select", "compare", "sweep", "reproduce", "probe", "memory", "plan", "export", "push", "report",
)  # fmt: skip


def python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "import weightlora; dir(weightlora); weightlora.__version__",
        "import weightlora.cli.main",
        "from weightlora.cli.main import main; main([])",
        "from weightlora.cli.main import build_parser; build_parser().format_help()",
        "from weightlora.cli.main import COMMANDS, command_parser\nfor one in COMMANDS: command_parser(one)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    done = python("-c", f"import sys\n{code}\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_plan_needs_no_extra_and_a_run_names_the_one_that_it_needs(tmp_path: Path) -> None:
    """As after a bare ``pip install``: packages of the extras are not there."""
    code = (
        f"import os, sys\nos.chdir({str(tmp_path)!r})\nfrom weightlora.cli.main import EXTRAS, main\n"
        "sys.modules.update(dict.fromkeys(EXTRAS))\n"
        "assert main(['plan', '--model', 'bert-tiny-shape', '--json', 'plan.json']) == 0\n"
        "sys.exit(main(['train', '--task', 'docstrings', '--model', 'bert-tiny-shape']))"
    )
    done = python("-c", code)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()  # and libraries are silent when they are imported
    assert re.search(r"error: the package \w+ is missing; pip install 'weightlora\[tasks\]'", line)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_version_of_the_module_and_of_the_package_agree() -> None:
    done = python("-X", "importtime", "-m", "weightlora", "--version")
    assert (done.returncode, done.stdout) == (0, f"weightlora {__version__}\n")
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert loaded & set(HEAVY) == set()
    assert "weightlora" in loaded


def test_the_installed_command_is_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("weightlora")
    if not script.is_file():
        pytest.skip(f"NO COMMAND: the package is not installed beside {sys.executable}")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"weightlora {__version__}\n")


def test_without_a_command_there_is_help_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora() == 2
    said = capsys.readouterr().out
    assert all(re.search(rf"^ +{command}( |$)", said, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("report", "runs", "--jsn", "x"), "--jsn x; did you mean --json?"),
        (("train", "--text-colum", "x"), "--text-colum x; did you mean --text-column?"),
        (("train", "--epochs", "3"), "--epochs 3; did you mean --num-train-epochs?"),
        (("train", "--max-stesp", "3"), "--max-stesp 3; did you mean --max-steps?"),
        (("train", "--qqq=1"), "--qqq=1\n"),
        (("train", "--resume"), "--resume; did you mean weightlora resume RUN?"),
    ],
)
def test_a_misspelled_flag_gets_the_nearest(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hint: str
) -> None:
    assert weightlora(*words) == 2
    assert f"unrecognized arguments: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert weightlora(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"  weightlora {command} " in said.partition("example:")[2]
    assert "--json" in said


def test_a_method_has_the_name_that_it_is_registered_by() -> None:
    from weightlora.methods import METHODS

    assert [kind.name for kind in METHODS.values()] == list(METHODS)


def run_words(data: Path, out: Path) -> list[str]:
    words = ["--task", "sst2", "--data-dir", str(data), *TINY, "--max-steps", "6", "--logging-steps", "2"]
    return ["train", *words, "--k", "3", "--select-after", "2", "--out", str(out)]


def test_plain_lines_where_nobody_watches(killer: Killer, small_data: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "errors.txt", tmp_path / "output.txt"
    child = killer.start(run_words(small_data, tmp_path / "run"), *outputs)
    code, (errors, output) = killer.finish(child), (path.read_text() for path in outputs)
    assert code == 0, errors
    assert "\r" not in errors
    steps = re.findall(r"^weightlora\+ on sst2: step (\d+)/6 .*about \d+ s left$", errors, re.MULTILINE)
    assert steps == list("123456")
    assert "loss" in errors
    assert re.search(r"^kept 3 of 12 adapters: ", errors, re.MULTILINE)
    seam = ("kept 3 of", "their rank goes from ", "with these, ")
    ours = ("weightlora+ on sst2: step", "12 adapters train", "with all of them, ", *seam)
    others = [line for line in errors.splitlines() if not line.startswith(ours)]
    assert others == [], "libraries are silent"
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in output
    assert re.search(r"^  accuracy: 0\.\d+ .*, on \d+ validation rows; \d+ training rows$", output, re.MULTILINE)
    assert read(tmp_path / "run" / "record.json")["argv"][:2] == ["weightlora", "train"]


def test_a_bar_on_a_terminal(killer: Killer, small_data: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    child = killer.start(run_words(small_data, tmp_path / "run"), os.ttyname(theirs))
    os.close(theirs)
    said = read_terminal(ours, waits=True)
    os.close(ours)
    assert killer.finish(child) == 0, said
    assert re.search(r"weightlora\+ on sst2: +100%\|█+\| 6/6 ", said)
    assert said.count("\r") > 3
    assert "about" not in said, "no plain lines beside the bar"
    assert "loss=" in said
    assert "Traceback" not in said
    clean = [line.rpartition("\r")[2] for line in said.split("\r\n")]
    assert any(line.startswith("kept 3 of 12 adapters: ") for line in clean), "a message has a line of its own"


def test_a_terminal_that_does_not_know_its_size_shows_the_bar_too() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from weightlora.runs.progress import Progress

    ours, theirs = pty.openpty()
    assert os.get_terminal_size(theirs).columns == 0
    with os.fdopen(theirs, "w") as stream:
        progress = Progress("title", stream)
        moment = TrainingArguments(output_dir="unused"), TrainerState(max_steps=4), TrainerControl()
        progress.on_train_begin(*moment)
        for step in range(1, 5):
            moment[1].global_step = step
            progress.on_step_end(*moment)
        logging.getLogger("weightlora").warning("a message")
        progress.close()
        logging.getLogger("weightlora").warning("not for the bar any more")
    said = read_terminal(ours)
    os.close(ours)
    assert re.search(r"title: +100%\|█+\| 4/4 ", said)
    assert "\ra message\r\n" in re.sub(r"\r +\r", "\r", said)
    assert "any more" not in said


def read_terminal(terminal: int, *, waits: bool = False, seconds: float = 120) -> str:
    """Everything written to a terminal until its other end is closed; if it ``waits``, also what is still to come."""
    data, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            data += part
        elif not waits:
            break
    return data.decode(errors="replace")


def test_interrupted_says_how_to_go_on(killer: Killer, small_data: Path, tmp_path: Path) -> None:
    """Control-C in the middle of training: one line, code 130, and a run that can be resumed."""
    run, pipe = tmp_path / "run", tmp_path / "stderr"
    words = run_words(small_data, run)
    words[words.index("6")] = "400"
    os.mkfifo(pipe)
    child = killer.start([*words, "--save-steps", "20"], pipe)
    lines = []
    with pipe.open() as stream:
        for line in stream:
            lines.append(line)
            if "step 39/400" in line:
                os.kill(child, signal.SIGINT)
    assert killer.finish(child) == 130
    assert lines[-1] == f"interrupted; `weightlora resume {run}` goes on from the last checkpoint\n"
    assert "Traceback" not in "".join(lines)
    assert read(run / "record.json")["status"] == "running"

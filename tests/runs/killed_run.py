"""Run commands in forked children that are killed at a chosen event; a script, to be started with one thread.

An event is something that is about to happen to the file system below the run directory, or a step that the optimizer
has done. Importing the libraries takes seconds and a fork nothing, so that many points of a run can be tried, each with
a real SIGKILL in a process of its own. Standard input: one job as JSON per line; standard output: one answer per line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

CHANGES = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree")
)


@dataclass
class Events:
    """Notes what a process does below `folder`, and kills it at the `number`-th event whose label starts with `kind`.

    A `kind` of ``+3`` counts all events after the process's third step. With a `delay` (seconds) it dies that much
    later, in the middle of whatever it does then. `signal`: by which.
    """

    folder: str
    log: Path
    kind: str
    number: int
    delay: float
    signal: str = "SIGKILL"
    labels: list[str] = field(default_factory=list)

    def watch(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: self.happened("step"))
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and isinstance(args[0], str | os.PathLike):
            # shutil.copyfile: the second path is the one that changes.
            path = str(args[1 if event == "shutil.copyfile" else 0])
            if path.startswith(self.folder) and (event != "open" or writes(*args[1:])):
                self.happened(f"{event} {path[len(self.folder) + 1 :]}")

    def happened(self, label: str) -> None:
        self.labels.append(label)
        if self.is_its_turn():
            self.save()
            if not self.delay:
                os.kill(os.getpid(), getattr(signal, self.signal))
            # The default action of SIGALRM ends a process as abruptly, wherever it is by then.
            signal.setitimer(signal.ITIMER_REAL, self.delay)

    def is_its_turn(self) -> bool:
        if not self.kind.startswith("+"):
            of_kind = [label.startswith(self.kind) for label in self.labels]
            return of_kind[-1] and sum(of_kind) == self.number
        steps = [index for index, label in enumerate(self.labels) if label == "step"]
        after = int(self.kind[1:])
        return len(steps) >= after and len(self.labels) - 1 - steps[after - 1] == self.number

    def save(self) -> None:
        whole = self.log.with_suffix(".new")  # it may be killed here, too
        whole.write_text(json.dumps(self.labels), encoding="utf-8")
        os.replace(whole, self.log)


def writes(mode: str | None, flags: int) -> bool:
    """Whether ``open`` was asked to change a file."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or any(letter in (mode or "") for letter in "wax+")


def child(words: list[str], events: Events, output: Path) -> NoReturn:
    """What a forked process does: one command, its output in a file."""
    from weightlora.cli.main import main

    code = 70
    with output.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        events.watch()
        try:
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            stream.flush()
            events.save()
            os._exit(code)


def run(words: list[str], folder: str, log: Path, kill: list[Any]) -> dict[str, Any]:
    """Fork, run, and tell how it ended: ``signal`` or ``code``, and the events until then."""
    pid = os.fork()
    if pid == 0:
        child(words, Events(folder, log, *kill), log.with_suffix(".txt"))
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    return {
        "signal": os.WTERMSIG(status) if killed else None,
        "code": None if killed else os.WEXITSTATUS(status),
        "events": json.loads(log.read_text(encoding="utf-8")),
    }


def life(job: dict[str, Any]) -> dict[str, Any]:
    """Train, be killed, resume, be killed, ..., and at last resume to the end."""
    folder: str = job["out"]
    log = Path(folder + ".events")
    words: list[str] = job["train"]
    tries = []
    for kill in [*job["kills"], ["nothing", 0, 0.0]]:
        tries.append(run(words, folder, log, kill))
        if tries[-1]["code"] is not None:
            break
        # Before the configuration is whole there is nothing to resume, and the same command starts again.
        words = ["resume", folder] if (Path(folder) / "config.json").is_file() else job["train"]
    return {"tries": tries, "output": log.with_suffix(".txt").read_text()}


REHEARSAL = (
    "--task", "docstrings", "--max-train-samples", "16", "--max-eval-samples", "8", "--model", "bert-tiny-shape",
    "--max-length", "24", "--per-device-train-batch-size", "8", "--max-steps", "4", "--select-after", "2", "--k", "3",
)  # fmt: skip


def prepare() -> None:
    """Import all that a run needs, and do one: its children then have what libraries load and work out in passing."""
    import torch
    from tests.once import collect_seldom, remember

    from weightlora.cli.main import main

    torch.set_num_threads(1)
    remember()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        assert main(["train", *REHEARSAL, "--out", str(Path(folder) / "run")]) == 0
    logging.getLogger().handlers.clear()  # each child says what it has to say where its own standard error is
    collect_seldom()


def start(job: dict[str, Any]) -> dict[str, Any]:
    """A program's `entry`; its standard error is a terminal or a pipe that the test reads while it runs, or a file."""
    streams = [os.open(job[name], os.O_RDWR | os.O_NOCTTY | os.O_CREAT) for name in ("stdout", "stderr")]
    pid = os.fork()
    if pid == 0:
        entry = importlib.import_module(job["program"]).entry
        os.chdir(job["folder"])
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
            os.close(stream)
        sys.argv = ["weightlora", *job["words"]]
        os.environ["TERM"] = "xterm"
        # A job that a script starts in the background is born deaf to Control-C and hands that on: undo it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            entry()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for stream in streams:
        os.close(stream)
    return {"pid": pid}


def finish(job: dict[str, Any]) -> dict[str, Any]:
    """How such a command ended."""
    return {"code": os.waitstatus_to_exitcode(os.waitpid(job["pid"], 0)[1])}


def call(job: dict[str, Any]) -> dict[str, Any]:
    """What a function of the tests returns in a child: this process hashes text otherwise than the tests'."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        module, _, name = job["call"].partition(":")
        try:
            said = getattr(importlib.import_module(module), name)()
        except BaseException:
            said = traceback.format_exc()
        with os.fdopen(writer, "w") as stream:
            json.dump({"hash": hash("text"), "said": said}, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found: dict[str, Any] = json.load(stream)
    os.waitpid(pid, 0)
    return found


def main() -> None:
    prepare()
    for line in sys.stdin:
        job = json.loads(line)
        do = next(do for key, do in DO.items() if key in job)
        print(json.dumps(do(job)), flush=True)  # noqa: T201


DO = {"train": life, "words": start, "pid": finish, "call": call}

if __name__ == "__main__":
    main()

"""A script that imports everything once and then does jobs in forked children: one line of JSON each way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# No garbage is looked for until all is imported; see `once.collect_seldom`.
RUN = "import gc, runpy, sys; gc.disable(); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Forks:
    """The script's process, on one thread and without a GPU."""

    def __init__(self, script: Path) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # text hashes otherwise there
        settings = {"PYTHONPATH": path, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )

    def ask(self, job: dict[str, Any]) -> Any:
        """The answer to a job."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    @contextmanager
    def until_done(self) -> Iterator[None]:
        """Afterwards the script has come to its own end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        yield
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()

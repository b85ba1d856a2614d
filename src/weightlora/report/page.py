"""One self-contained HTML file from record files: opens from disk, asks nothing of the network, and prints."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora import __version__
from weightlora.errors import ConfigError
from weightlora.files import write_text
from weightlora.report.picture import TEMPLATES
from weightlora.report.runfiles import Found, RunFiles, find_runs

if TYPE_CHECKING:
    from jinja2 import Environment

    from weightlora.report.views import ComparisonView, RunView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A report as text: the page, and the same facts for a machine.

    ``left_out`` names what was found but is not in it, a line each.
    """

    html: str
    json: str
    runs: int
    left_out: tuple[str, ...]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; a reader sees the old one or the new one, never a part. Returns the path.

        Raises:
            ConfigError: nothing can be written there.
        """
        path = Path(path)
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; give the report a file, such as {path / 'report.html'}")
        try:
            return write_text(path, self.html)
        except OSError as error:
            raise ConfigError(f"cannot write the report to {path}: {error.strerror}; choose another file") from None


def report(paths: Sequence[str | os.PathLike[str]], metric: str | None = None) -> Report:
    """Make the page of the runs that ``paths`` name.

    All numbers are read from record files; what is computed here is how they are placed, means and spreads over seeds,
    and how many adapters two selections share. Equal files give equal bytes.

    Args:
        paths: run directories, record files, or folders that are searched for runs.
        metric: what runs are judged by: "eval_loss", or None for each task's own.

    Raises:
        ConfigError: a path leads to no run, no record can be read, or jinja2 or matplotlib is not installed.
    """
    environment = _environment()
    from weightlora.report.views import comparison_views, run_views

    found = find_runs([Path(path) for path in paths])
    found = dataclasses.replace(
        found, runs=tuple(dataclasses.replace(run, record=run.record.judged_by(metric)) for run in found.runs)
    )
    runs, comparisons = run_views(found.runs), comparison_views(found.runs)
    html = environment.get_template("report.html.j2").render(
        title=_title(found.runs),
        runs=runs,
        comparisons=comparisons,
        left_out=found.left_out,
        version=__version__,
        policy=_policy(environment),
    )
    return Report(html=html, json=_facts(found, comparisons, runs), runs=len(runs), left_out=found.left_out)


def _environment() -> Environment:
    try:
        import jinja2
        import matplotlib.ticker  # noqa: F401  # places the ticks of the charts
    except ImportError as error:
        raise ConfigError(
            f"a report needs {(error.name or '').partition('.')[0]}: pip install 'weightlora[report]'"
        ) from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _policy(environment: Environment) -> str:
    """What a browser may do with the page: its own style and its own script, known by their hashes; else nothing."""
    allowed = {}
    for name in ("report.css", "report.js"):
        digest = hashlib.sha256(environment.get_template(name).render().encode()).digest()
        allowed[name] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; img-src data:; style-src {allowed['report.css']}; script-src {allowed['report.js']};"
        " base-uri 'none'; form-action 'none'"
    )


def _title(runs: Sequence[RunFiles]) -> str:
    records = [run.record for run in runs]
    tasks = list(dict.fromkeys(record.task for record in records))
    what = records[0].method if len(records) == 1 else f"{len(records)} runs"
    return f"{what} on {', '.join(tasks)}"


def _facts(found: Found, comparisons: Sequence[ComparisonView], runs: Sequence[RunView]) -> str:
    """The same for a machine: what each run came to, each comparison's rows, and the stability of its selections."""
    data = {
        "runs": [_run_facts(run, view) for run, view in zip(found.runs, runs, strict=True)],
        "comparisons": [
            {**json.loads(view.table.to_json()), "stability": [entry.to_dict() for entry in view.measured]}
            for view in comparisons
        ],
        "left_out": list(found.left_out),
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _run_facts(run: RunFiles, view: RunView) -> dict[str, object]:
    record = run.record
    finite = record.score is not None and math.isfinite(record.score)
    return {
        "path": str(run.path),
        "status": record.status,
        "method": record.method,
        "preset": record.preset,
        "task": record.task,
        "model": record.model,
        "seed": record.seed,
        "metric": record.metric,
        "score": record.score if finite else None,
        "kept": [entry.name for entry in record.kept],
        "n_adapters": record.n_adapters,
        "error": record.error,
        "command": view.alone or view.command,
        "charts": [picture.name for picture in view.pictures],
    }

"""Whose checkpoints these are: a run has an id, which its folder and all of its checkpoints carry."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from weightlora.decoding import decode
from weightlora.errors import CheckpointError, ConfigError
from weightlora.files import write_text
from weightlora.graft.manifest import fingerprint
from weightlora.methods import Method
from weightlora.training.processes import check_same_everywhere, main_alone

RUN = "weightlora_run.json"
"""In a checkpoint: whose it is."""
IN_USE = ".weightlora_run.json"
"""In a folder of checkpoints: for which run it is in use. Scripts that list the folder see checkpoints alone."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder and checkpoints name it: an id of its own, the method's settings, the base's fingerprint."""

    id: str
    method: dict[str, object]
    base: str

    @classmethod
    def new(cls, method: Method, model: nn.Module) -> Run:
        """A run that begins now. The id comes from the system: the seeded generators stay where they are."""
        return cls(id=secrets.token_hex(8), method=method.to_dict(), base=fingerprint(model))

    @classmethod
    def read(cls, path: Path) -> Run | None:
        """What a file says; None without it.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            found: Run = decode(cls, json.loads(path.read_text(encoding="utf-8")), "")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if not found.id:
            raise CheckpointError(f"{path} is damaged: it names no run")
        return found

    def write(self, path: Path) -> None:
        """Say whose a checkpoint or a folder is."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    def check_same(self, method: Method, model: nn.Module, where: Path) -> None:
        """Raise CheckpointError unless method and base are the run's."""
        now = Run.new(method, model)
        if self.method != now.method:
            raise CheckpointError(f"{where} was made with {self.method}, not {now.method}; resume with the same method")
        if self.base != now.base:
            raise CheckpointError(
                f"{where} belongs to another base model: its configuration or weights differ; use the base (name,"
                " revision, seed, dtype) that the run started with"
            )


def check_folder(
    output_dir: Path, found: Sequence[Path], start: Path | None, *, resume: bool | str | Path, overwrite: bool
) -> list[Path]:
    """Keep runs apart: a folder holds the checkpoints of one.

    Args:
        output_dir: of this run.
        found: its checkpoints, whole or not.
        start: the one to go on from, if any.
        resume: as the user asked.
        overwrite: others may go.

    Returns:
        The checkpoints of other runs, which are to be removed.

    Raises:
        ConfigError: what is to be resumed would be removed.
        CheckpointError: there are checkpoints of another run.
    """
    if resume is True and overwrite:
        raise ConfigError("resume=True goes on with the run that overwrite=True removes; give one of them")
    own = _id(start)
    if resume is True:
        marker = Run.read(output_dir / IN_USE)
        if start is not None and marker is not None and own != marker.id:
            raise CheckpointError(
                f"{start} belongs to another run than {output_dir}; remove it, or resume it with"
                f" resume={str(start)!r} and another output_dir"
            )
        return []
    others = [folder for folder in found if start is None or _id(folder) != own]
    if others and not overwrite:
        raise CheckpointError(
            f"{output_dir} holds checkpoints of another run ({others[0].name}); give another output_dir,"
            " overwrite=True to remove them" + (", or resume=True to go on with that run" if start is None else "")
        )
    return others


def _id(folder: Path | None) -> str | None:
    """The id of a checkpoint's run; None where it has none, or none that can be read."""
    try:
        run = None if folder is None else Run.read(folder / RUN)
    except CheckpointError:
        return None
    return None if run is None else run.id


def enter_folder(output_dir: Path, start: Path | None, others: Sequence[Path], new: Run, device: torch.device) -> Run:
    """Take the folder: remove what is not this run's, and let it say whose it is, for all processes."""
    run = new if start is None else Run.read(start / RUN)
    assert run is not None  # a whole checkpoint says whose it is
    with main_alone() as mine:
        if mine:
            for folder in others:
                shutil.rmtree(folder)
            run.write(output_dir / IN_USE)
    run = Run.read(output_dir / IN_USE)
    assert run is not None
    check_same_everywhere("run", run.id, device)
    return run

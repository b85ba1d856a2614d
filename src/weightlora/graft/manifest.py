"""The small file that is read before a model is rebuilt: what structure the checkpoint beside it has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightlora.errors import CheckpointError
from weightlora.files import new_file, write_text
from weightlora.graft.adapters import Adapter
from weightlora.graft.selection import Selection

MANIFEST = "weightlora.json"
STATE = "weightlora.safetensors"
SCHEMA_VERSION = 1

Stage = Literal["warmup", "final"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Structure and progress of one checkpoint.

    ``stage`` is "warmup" (gates on, all n adapters present) or "final" (stock LoRA on the survivors). ``adapters`` are
    the n adapters that the run started with; ``method`` the method's own settings; ``data`` whatever the trainer's
    side must know.
    """

    stage: Stage
    step: int
    adapter: str
    adapters: tuple[tuple[str, int, int, int], ...]
    method: dict[str, Any]
    selection: Selection | None = None
    data: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @staticmethod
    def describe(live: Sequence[Adapter]) -> tuple[tuple[str, int, int, int], ...]:
        """``(name, d_in, d_out, rank)`` of each adapter: what makes two models the same to a checkpoint."""
        return tuple((a.name, a.d_in, a.d_out, a.rank) for a in live)

    def check_same_model(self, live: Sequence[Adapter]) -> None:
        """Raise CheckpointError, naming the first difference, unless the model has the run's adapters."""
        here = self.describe(live)
        if here == self.adapters:
            return
        if len(here) != len(self.adapters):
            detail = f"it was made with {len(self.adapters)} adapters, this model has {len(here)}"
        else:
            old, new = next((a, b) for a, b in zip(self.adapters, here, strict=True) if a != b)
            detail = f"it was made with {old[0]} {old[1:]}, this model has {new[0]} {new[1:]} (d_in, d_out, rank)"
        raise CheckpointError(f"the checkpoint belongs to another model: {detail}; use the model the run started with")

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, then the manifest, each atomically: a manifest that can be read has its tensors beside it."""
        with new_file(folder / STATE) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        write_text(folder / MANIFEST, self.to_json())

    def to_json(self) -> str:
        """Strict JSON, selection included."""
        data = {**asdict(self), "selection": None if self.selection is None else self.selection.to_dict()}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
        """Read a manifest and its tensors.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
        """
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise CheckpointError(
                    f"{path}: manifest schema {data['schema_version']} is not supported;"
                    f" this release reads {SCHEMA_VERSION}"
                )
            manifest = cls(
                stage=_stage(data["stage"]),
                step=int(data["step"]),
                adapter=str(data["adapter"]),
                adapters=tuple((str(n), int(i), int(o), int(r)) for n, i, o, r in data["adapters"]),
                method=dict(data["method"]),
                selection=None if data["selection"] is None else Selection.from_dict(data["selection"]),
                data=dict(data["data"]),
            )
            return manifest, load_file(folder / STATE)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: not a whole checkpoint, {Path(error.filename or STATE).name} is missing"
            ) from None
        except SafetensorError as error:
            raise CheckpointError(f"{folder / STATE} is damaged: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged: {error}") from None


def _stage(value: Any) -> Stage:
    if value not in ("warmup", "final"):
        raise ValueError(f"stage {value!r}")
    return value  # type: ignore[no-any-return]

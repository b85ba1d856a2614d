"""Hand over the result as stock PEFT, server-ready or merged weights, each reloaded before it is called done."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import peft
import torch
import transformers
from torch import Tensor, nn

from weightlora.errors import ConfigError, ExportError
from weightlora.files import new_folder, write_text
from weightlora.graft.adapters import base_of, is_sharded, switched_off
from weightlora.graft.card import model_card
from weightlora.graft.llama_cpp import gguf_as_peft, write_gguf
from weightlora.graft.merging import merge
from weightlora.graft.profiles import Live, read, write_adapter
from weightlora.graft.quantised import keep_unpacked
from weightlora.graft.selection import Selection
from weightlora.graft.tuners import refuse_own_format
from weightlora.graft.verify import (
    blank,
    compare,
    gap,
    logits,
    plain_base,
    reload_adapter,
    sample_logits,
    save_and_reload,
)

Profile = Literal["native", "portable", "dense", "gguf", "merged"]
PROFILES: tuple[str, ...] = get_args(Profile)
RECORD = "export.json"
SCHEMA_VERSION = 1


class Fitted(Protocol):
    """Anything with a PEFT model and, if there was one, the selection: what ``wl.fit`` returns."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def selection(self) -> Selection | None: ...


@dataclass(frozen=True, kw_only=True)
class Export:
    """Say what was written, and how well it reproduces the trained model.

    ``max_difference`` of the logits is at most ``tolerance``. ``rank`` is the highest rank in the file (None: merged).
    ``notes`` are sentences for people.
    """

    path: Path
    profile: str
    max_difference: float
    tolerance: float
    rank: int | None
    notes: tuple[str, ...] = ()


def export(
    result: Fitted | nn.Module,
    out: str | Path,
    profile: str = "native",
    *,
    sample: Mapping[str, object] | None = None,
    adapter: str | None = None,
    base: nn.Module | None = None,
    overwrite: bool = False,
    about: str = "",
) -> Export:
    """Write the adapter (or merged model) to a folder, load it again with stock software, and compare the logits.

    The folder appears only when it is whole and verified. The model is not changed. If no choice has been made yet,
    gates are multiplied into B, and adapters whose gate is zero are left out.

    Weights are compared with the unchanged base, read from its folder or the cache without network. Other weights that
    differ from it (trained weights of the base, BatchNorm's statistics, resized embeddings) are written by ``native``
    and ``merged``; ``portable``, ``dense`` and ``gguf`` refuse them by name.

    - ``native``: stock PEFT with the ranks and scales as trained, and trained heads inside.
    - ``portable`` (vLLM, SGLang): one rank r with ``lora_alpha == r``, every scale multiplied into B, no
      patterns, no ``modules_to_save``, a list of full names as targets. If one of q, k, v (or of gate, up) has an
      adapter, the others get one of zeros. A trained head is written beside it, to ``head.safetensors``.
    - ``dense``: portable, with adapters of zeros at the same places of all other blocks.
    - ``gguf``: one file for llama.cpp (Llama, Mistral, Qwen2, Qwen3; needs the package gguf), ranks as trained. The
      check reads that file.
    - ``merged``: a plain Transformers model with each adapter's update added to its weights, heads included.

    Args:
        result: what ``wl.fit`` returned, or a PEFT model. A model without adapters can be exported as ``merged``.
        out: the folder; new, empty, or an earlier export.
        profile: one of the five above.
        sample: a batch (dict of tensors) to compare logits on; None: random token ids.
        adapter: PEFT's adapter name; default: the active one.
        base: merge into this full-precision model of the same structure, for example if the base under the adapters is
            quantised; a note says how far its logits are from those of the trained model.
        overwrite: replace whatever is in `out`.
        about: Markdown that is put at the end of ``README.md``, such as what the run measured.

    Returns:
        An :class:`Export`.

    Raises:
        ConfigError: the profile is unknown, or `base` is given to another profile than ``merged``.
        AdapterError: the model has no adapters, or of a kind that is not plain LoRA.
        ExportError: the folder is in use, the model cannot be written in this form, or the reloaded export differs.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> done = export(model, Path(tempfile.mkdtemp()) / "out", sample={"input": torch.ones(1, 4)})
    >>> done.profile, done.rank, done.max_difference <= done.tolerance
    ('native', 2, True)
    """
    _check_types(result, out, sample, base)
    if profile not in PROFILES:
        raise ConfigError(f"export profile {profile!r} is unknown; use one of {', '.join(PROFILES)}")
    if base is not None and profile != "merged":
        raise ConfigError(f"base= is a model to merge into, but profile {profile!r} merges nothing; use 'merged'")
    model, selection = (result, None) if isinstance(result, nn.Module) else (result.model, result.selection)
    refuse_own_format(model)
    if is_sharded(model):
        raise ExportError(
            "the base is sharded over processes (FSDP); write the adapter with trainer.save_model(folder), then load it"
            " on a whole base in one process, with PeftModel.from_pretrained, and export that"
        )
    path = _free_folder(out, overwrite)
    keep_unpacked(model)
    live = read(model, adapter, profile, other_base=base is not None)
    sample, truth = sample_logits(live.root, sample)
    own = truth
    if base is not None:
        truth = _on(base, live, sample)
    rank, plain = None, live.root
    try:
        with new_folder(path) as folder:
            if profile == "merged":
                plain, notes = merge(live, base)
                again = logits(save_and_reload(plain, folder), sample)
                if base is not None:
                    notes = (*notes, _other_base(own, again))
                elif live.pairs and (lost := _rounding(live, sample, truth, again)):
                    notes = (*notes, lost)
            else:
                rank, notes, again, said = _written(live, folder, profile, sample)
                notes = (*notes, *(f"stock PEFT warned while loading it: {text}" for text in said))
            difference, tolerance = compare(truth, again, plain)
            done = Export(
                path=path, profile=profile, max_difference=difference, tolerance=tolerance, rank=rank, notes=notes
            )
            _write_papers(folder, done, live, selection, about)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"cannot write the export to {path}: {reason}; use another folder") from error
    return done


def _written(
    live: Live, folder: Path, profile: str, sample: Mapping[str, object]
) -> tuple[int, tuple[str, ...], Tensor, tuple[str, ...]]:
    """Write an adapter; its highest rank, notes, the logits of what was written, and what PEFT warned of."""
    if profile != "gguf":
        return *write_adapter(live, folder, profile), *_reloaded(live.root, folder, sample, live)
    rank, notes = write_gguf(live, folder)
    with tempfile.TemporaryDirectory() as back:
        gguf_as_peft(live, folder, Path(back))
        return rank, notes, *_reloaded(live.root, Path(back), sample, live)


def _reloaded(
    root: nn.Module, folder: Path, sample: Mapping[str, object], live: Live | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Logits of the adapter in `folder` on a plain copy of `root`, and what PEFT warned of.

    What of `live` differs from a stock base is blank in that copy: it must come from the folder.
    """
    plain = plain_base(root)
    if live is not None:
        blank(plain, live.outside.tensors)
    model, said = reload_adapter(plain, folder)
    return logits(model, sample), said


def _rounding(live: Live, sample: Mapping[str, object], truth: Tensor, again: Tensor) -> str | None:
    """A warning where half precision has rounded away as much as the adapters do, or half of it."""
    with switched_off(live.root, live.name):
        without = logits(live.root, sample)
    lost, effect = gap(truth, again), gap(truth, without)
    if lost < effect / 2 or lost == 0.0:
        return None
    return (
        f"merging rounded the weights by as much as the adapters do: logits moved by {lost:.3g}, and the adapters"
        f" move them by {effect:.3g}; use profile 'native' or 'portable', or merge into base= in float32"
    )


def _on(base: nn.Module, live: Live, sample: Mapping[str, object]) -> Tensor:
    """What a model merged into another base must compute: that base with the adapter on it."""
    if live.config is None:
        raise ExportError("the model has no adapters, so there is nothing to merge into base=; leave it out")
    merge(live, base)  # refuses a base of another structure, in words
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(live, Path(folder), "native")
        return _reloaded(base_of(base), Path(folder), sample)[0]


def _other_base(own: Tensor, again: Tensor) -> str:
    """How far the merged model is from the live one, which runs on another base: the error of quantisation, mostly."""
    return (
        f"merged into base=: its logits differ by {gap(own, again):.3g} at most from the live model's, which has"
        " another base"
    )


def _check_types(result: object, out: object, sample: object, base: object) -> None:
    model = result if isinstance(result, nn.Module) else getattr(result, "model", result)
    for name, value, kinds, words in (
        ("result", model, nn.Module, "what fit returned, or a PEFT model"),
        ("out", out, str | Path, "the path of a folder"),
        ("sample", sample, Mapping | None, "a batch as a dict of tensors, or None"),
        ("base", base, nn.Module | None, "a model, or None"),
    ):
        if not isinstance(value, kinds):
            raise ConfigError(f"{name} is a {type(value).__name__}; give {words}")


def _free_folder(out: str | Path, overwrite: bool) -> Path:
    """`out` as an absolute path, if an export may take its place: new, empty, or an earlier export and nothing else."""
    path = Path(os.path.abspath(Path(out).expanduser()))
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; give a folder")
    held = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if not held or overwrite:
        return path
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        ours = {RECORD, *record["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        raise ExportError(
            f"{path} is not empty and holds no earlier export; give a new folder, or pass overwrite=True to replace it"
        ) from None
    if held - ours:
        raise ExportError(
            f"{path} holds an earlier export and {sorted(held - ours)[0]!r}, which would be lost; give a new folder, or"
            " pass overwrite=True to replace it"
        )
    return path


def _write_papers(folder: Path, done: Export, live: Live, selection: Selection | None, about: str) -> None:
    """``selection.json``, ``README.md``, and the record of the export, which also marks the folder as one."""
    if selection is not None:
        selection.save(folder / "selection.json")
    verified = (
        "Reloaded from this folder before it was handed over:"
        f" the largest difference of logits was {done.max_difference:.3g} (tolerance {done.tolerance:.3g})."
    )
    card = model_card(live, profile=done.profile, selection=selection, notes=done.notes, verified=verified)
    write_text(folder / "README.md", card + (f"\n{about.strip()}\n" if about else ""))
    record = {
        "schema_version": SCHEMA_VERSION,
        "profile": done.profile,
        "rank": done.rank,
        "max_difference": done.max_difference,
        "tolerance": done.tolerance,
        "notes": done.notes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "files": sorted(entry.name for entry in folder.iterdir()),
    }
    write_text(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    # safetensors lets only the owner read its files; a server often is somebody else.
    for entry in folder.iterdir():
        entry.chmod((folder / RECORD).stat().st_mode)

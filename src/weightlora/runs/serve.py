"""A finished run's adapter, brought back to life and written in another form."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel

from weightlora.errors import CheckpointError
from weightlora.graft.export import Export, export
from weightlora.graft.selection import Selection
from weightlora.methods import METHODS, TunerMethod
from weightlora.runs.build import base_model
from weightlora.runs.lock import alone
from weightlora.runs.run import ADAPTER, SELECTION, finished
from weightlora.runs.spec import RunSpec
from weightlora.tasks import read_task


def export_run(
    folder: str | Path, out: str | Path, profile: str, *, overwrite: bool = False, about: str = ""
) -> Export:
    """Export a finished run's adapter.

    Args:
        folder: the run directory.
        out: where the export goes.
        profile: as :func:`weightlora.export`.
        overwrite: replace an earlier export.
        about: as :func:`weightlora.export`.

    Raises:
        CheckpointError: no finished run there, or one without an adapter.
    """
    folder, out = Path(folder), Path(out)
    spec = RunSpec.load(folder)
    if not finished(folder):
        raise CheckpointError(f"{folder} holds no finished run; `weightlora resume {folder}` finishes it")
    inside = folder.resolve() in out.resolve().parents
    with alone(folder if inside else out):
        return _export(spec, folder, out, profile, overwrite, about)


def _export(spec: RunSpec, folder: Path, out: Path, profile: str, overwrite: bool, about: str) -> Export:
    if not (folder / ADAPTER).is_dir():
        raise CheckpointError(
            f"{folder} has no adapter to export: method {spec.method.name!r} trains the model"
            " itself; open its model/ folder instead"
        )
    if issubclass(METHODS[spec.method.name], TunerMethod):
        raise CheckpointError(
            f"{folder / ADAPTER} is an adapter in PEFT's own format: {spec.method.name} is not plain LoRA, so no"
            " export profile"
            " can hold it; open it with peft.PeftModel.from_pretrained"
        )
    task = read_task(spec.task, spec.model.name)
    loaded = base_model(spec, task)
    targets = task.targets(loaded)
    if targets is not None:
        targets.announce(loaded.model.config, folded=True)  # the run folded it into the head that it saved
    model = PeftModel.from_pretrained(loaded.model, folder / ADAPTER)
    model.eval()
    return export(_Finished(model, Selection.load(folder / SELECTION)), out, profile, overwrite=overwrite, about=about)


def placement(folder: str | Path, trainer: str) -> tuple[Selection, str]:
    """Read what a finished run or ``select`` chose, and write it as another trainer's block.

    Args:
        folder: a run directory, or one that ``select`` wrote.
        trainer: as :meth:`weightlora.Selection.to`.

    Returns:
        The selection, and the block, with the dropout, the type of task and the heads that were used here.

    Raises:
        CheckpointError: nothing was selected there.
        ConfigError: as :meth:`weightlora.Selection.to`.
    """
    folder = Path(folder)
    selection = Selection.load(folder / SELECTION)
    config = next((path for path in (folder / ADAPTER, folder) if (path / "adapter_config.json").is_file()), None)
    if config is None:
        raise CheckpointError(
            f"{folder} holds a selection and no adapter_config.json beside it; give a run, or --out of select"
        )
    used = LoraConfig.from_pretrained(str(config))
    heads = list(used.modules_to_save or []) or None
    return selection, selection.to(
        trainer, task_type=used.task_type, lora_dropout=used.lora_dropout, modules_to_save=heads
    )


class _Finished:
    """What `export` takes: a model and what was kept in it."""

    def __init__(self, model: PeftModel, selection: Selection) -> None:
        self.model, self.selection = model, selection

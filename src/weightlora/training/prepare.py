"""What one call of ``fit`` will do, worked out and checked before anything is written or trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import Trainer

from weightlora.errors import CheckpointError, ConfigError
from weightlora.graft.fast import PathName
from weightlora.graft.manifest import Manifest
from weightlora.graft.optimizer import check_groups
from weightlora.graft.start import moved_by
from weightlora.methods import AdapterMethod
from weightlora.training import checkpoint
from weightlora.training.budget import MicroBatches, allow
from weightlora.training.driver import Driver
from weightlora.training.global_batch import GlobalBatch, averages
from weightlora.training.held_out import hold_out
from weightlora.training.identity import Run, check_folder
from weightlora.training.initial import check_checkpoints
from weightlora.training.inside import model_of
from weightlora.training.preflight import torch_optimizer
from weightlora.training.processes import check_same_everywhere, processes
from weightlora.training.results import PhaseResult, read_progress
from weightlora.training.resuming import OptimizerOrder
from weightlora.training.sharding import asked_for, check_method, to_device
from weightlora.training.trainer import planned_steps, split_batch
from weightlora.training.whole_run import Losses

log = logging.getLogger("weightlora")

Split = tuple[int, int] | None  # micro-batch and accumulation; None: as the trainer has them


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that a run goes on from.

    ``seconds``: of its phase in earlier processes. ``phases``: those before it. ``batch``: of one of that run's steps.
    """

    folder: Path
    manifest: Manifest
    tensors: dict[str, Tensor]
    batch: GlobalBatch
    seconds: float
    phases: tuple[PhaseResult, ...]
    losses: Losses

    @classmethod
    def read(cls, folder: Path) -> Start:
        """What it says.

        Raises:
            CheckpointError: it is damaged.
        """
        manifest, tensors = Manifest.read(folder)
        seconds, phases = read_progress(manifest.data, folder)
        return cls(
            folder=folder,
            manifest=manifest,
            tensors=tensors,
            batch=GlobalBatch.read(manifest.data, folder),
            seconds=seconds,
            phases=tuple(phases),
            losses=Losses.read(manifest.data, folder),
        )

    @property
    def after_the_seam(self) -> bool:
        """Whether the adapters have their last structure there."""
        return self.manifest.stage == "final"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin.

    ``others``: checkpoints of other runs, which may go. ``splits``: of the batch, before and after the seam.
    ``order``: of the optimizer's groups in the checkpoint.
    """

    trainer: Trainer
    driver: Driver
    run: Run
    start: Start | None
    others: tuple[Path, ...]
    splits: tuple[Split, Split]
    max_steps: int
    batch: GlobalBatch
    sharded: bool
    order: OptimizerOrder | None

    @property
    def output_dir(self) -> Path:
        """Where its checkpoints go."""
        return Path(str(self.trainer.args.output_dir))


def prepare(
    trainer: Trainer,
    method: AdapterMethod,
    micro_batches: MicroBatches,
    *,
    resume: bool | str | Path,
    overwrite: bool,
    engine: PathName,
) -> Prepared:
    """Find where the run goes on, count what a limit needs, begin the policy, and refuse what cannot go well.

    Nothing is written. Of the trainer only that is changed which :func:`borrowed` gives back.

    Args:
        trainer: as it was handed to ``fit``.
        method: what is wanted.
        micro_batches: as the user wants them, before and after the seam.
        resume, overwrite, engine: as ``fit``.

    Raises:
        AdapterError, ScheduleError, CheckpointError, ConfigError, BudgetError: it cannot run, or not as it is set up.
    """
    output_dir = Path(str(trainer.args.output_dir))
    sharded = asked_for(trainer) is not None and processes() > 1
    if sharded:
        to_device(trainer)
    start, others = _start(trainer, output_dir, resume=resume, overwrite=overwrite)
    held_out = hold_out(trainer, method.needs.held_out)
    allowed = allow(trainer, method, micro_batches, stock=engine == "stock", sharded=sharded)
    before, after = (split_batch(trainer, size) for size in allowed.micro_batches)
    max_steps, model = planned_steps(trainer), model_of(trainer)
    driver = Driver(model, method, max_steps, engine=engine, held_out=held_out, budget=allowed.budget)
    if trainer.optimizer is not None and driver.seam is not None:
        check_groups(torch_optimizer(trainer.optimizer))
    check_checkpoints(trainer, driver.name, resumed=start is not None)
    run = Run.new(method, model)
    order = None
    if start is not None:
        _check_same_run(start, driver, run, max_steps)
        order = OptimizerOrder(trainer, start.manifest.data, start.folder)
    _check_best(trainer, driver)
    if sharded:
        check_method(method, driver.policy, moved_by(model, driver.name))
    split = before is not None or after is not None
    if start is None:
        averaged = (split or processes() > 1) and averages(trainer)
    else:
        averaged = start.batch.add_up(trainer, split, output_dir)
    return Prepared(
        trainer=trainer,
        driver=driver,
        run=run,
        start=start,
        others=others,
        splits=(before, after),
        max_steps=max_steps,
        batch=GlobalBatch.of(trainer, averaged),
        sharded=sharded,
        order=order,
    )


def _start(
    trainer: Trainer, output_dir: Path, *, resume: bool | str | Path, overwrite: bool
) -> tuple[Start | None, tuple[Path, ...]]:
    """The checkpoint to go on from, with steps of the trainer as large as that run's, and other runs' checkpoints."""
    folder = checkpoint.resolve(resume, output_dir)
    others = check_folder(output_dir, checkpoint.folders(output_dir), folder, resume=resume, overwrite=overwrite)
    if resume is not False:
        # Each process has looked for itself.
        check_same_everywhere("checkpoint", "none" if folder is None else folder.name, trainer.args.device)
    if folder is None:
        return None, tuple(others)
    start = Start.read(folder)
    structure = "the survivors alone" if start.after_the_seam else "all adapters"
    log.info("going on from %s, with %s", folder.name, structure)
    start.batch.keep(trainer, folder)
    return start, tuple(others)


def _check_same_run(start: Start, driver: Driver, run: Run, max_steps: int) -> None:
    """The checkpoint must belong to this model, method and length."""
    start.manifest.check_same_model(driver.adapters, run.base)
    if start.manifest.method != run.method:
        raise CheckpointError(
            f"{start.folder} was made with {start.manifest.method}, not {run.method}; resume with the same method"
        )
    checkpoint.check_length(start.folder, max_steps)


def _check_best(trainer: Trainer, driver: Driver) -> None:
    """An earlier checkpoint has gates or another form, which a method that decides at the end has taken off by then."""
    setup = driver.policy.setup
    formed = setup.gates != "none" or setup.form is not None
    if trainer.args.load_best_model_at_end and driver.seam is None and formed:
        raise ConfigError(
            f"{driver.method.name} decides only at the end, so an earlier checkpoint cannot be loaded back as the best;"
            " set load_best_model_at_end=False"
        )

"""What ``fit`` says of its decisions, beside the losses that the trainer prints, where logging is not set up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from tqdm import tqdm
from transformers import PrinterCallback, Trainer

log = logging.getLogger("weightlora")


@contextlib.contextmanager
def beside_the_losses(trainer: Trainer) -> Iterator[None]:
    """Print the lines of level INFO where the trainer prints its losses; warnings go where they always went.

    Nothing is printed, and nothing changed, where

    - logging is set up for these lines: they come there, and once,
    - the logger ``weightlora`` has a level above INFO of its own,
    - the trainer prints no losses: ``disable_tqdm`` without a ``PrinterCallback``, a process beside the main one, or a
      ``log_level`` (by default Transformers' verbosity) above warnings.
    """
    own, usual = log.level, log.getEffectiveLevel()
    set_up = own > logging.INFO or (usual <= logging.INFO and log.hasHandlers())
    if set_up or not _prints_losses(trainer):
        yield
        return

    def aside(record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            tqdm.write(record.getMessage())
            return False
        return record.levelno >= usual

    log.addFilter(aside)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(own)
        log.removeFilter(aside)


def _prints_losses(trainer: Trainer) -> bool:
    args = trainer.args
    shown = not args.disable_tqdm or any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)
    return shown and trainer.is_world_process_zero() and args.get_process_log_level() <= logging.WARNING

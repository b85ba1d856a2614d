"""What ``fit`` says: of its decisions, beside the losses that the trainer prints, and of a slow processor."""

from __future__ import annotations

import contextlib
import logging
import timeit
from collections.abc import Iterator
from functools import cache

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer

from weightlora.training.inside import model_of

log = logging.getLogger("weightlora")
SLOW = 8.0  # times as long


def tell_slow_bfloat16(trainer: Trainer) -> None:
    """Warn where a processor would compute in bfloat16 without being made for it."""
    if trainer.args.device.type != "cpu":
        return
    weights = any(p.dtype == torch.bfloat16 for p in model_of(trainer).parameters())
    change = ["set bf16=False"] * trainer.args.bf16 + ["load the base in float32 (--dtype float32)"] * weights
    if change and (times := slower_in_bfloat16()) > SLOW:
        what = f"this processor takes {times:.0f} times as long for a backward product in bfloat16 as in float32"
        log.warning("%s; %s", what, " and ".join(change))


@cache
def slower_in_bfloat16() -> float:
    """How many times as long ``g @ W`` takes in bfloat16 as in float32: some 40 to 300 without AVX-512.

    ``x @ W.T`` of the forward pass takes 6 to 9 times as long there.
    """

    def seconds(dtype: torch.dtype) -> float:
        g, weight = torch.ones(32, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: g @ weight, number=1, repeat=3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


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

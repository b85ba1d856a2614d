"""Several processes in one run: one writes while the others wait, and all of them decide alike."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

from weightlora.errors import CheckpointError, ScheduleError


def processes() -> int:
    """How many processes share this run; 1 where torch.distributed is not in use."""
    return distributed.get_world_size() if _together() else 1


def wait() -> None:
    """Wait until all processes have reached this call."""
    if processes() > 1:
        distributed.barrier()


@contextlib.contextmanager
def main_alone() -> Iterator[bool]:
    """Wait until all processes are here, then let the main one do what is inside before any goes on.

    >>> with main_alone() as mine:
    ...     mine
    True
    """
    wait()
    yield not _together() or distributed.get_rank() == 0
    wait()


def mean_over_processes(tensor: Tensor) -> None:
    """Replace a tensor by its mean over all processes, in place: one collective.

    Under data parallelism each process has seen its own examples; all must move the gates alike. Omega is no parameter
    of the model, so the wrapper that averages the model's gradients does not know it.
    """
    if processes() > 1:
        distributed.all_reduce(tensor)
        tensor.div_(processes())


def check_same_everywhere(what: str, text: str, device: torch.device) -> None:
    """Raise CheckpointError unless all processes have the same `text` (their file systems may not be the same).

    >>> check_same_everywhere("checkpoint", "checkpoint-3", torch.device("cpu"))
    """
    if processes() == 1:
        return
    mine = zlib.crc32(text.encode())
    bounds = torch.tensor([mine, -mine], device=device)
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    if bounds[0] != -bounds[1]:
        raise CheckpointError(
            f"the processes of this run found different {what}s; this one: {text}; give all of them one output_dir,"
            " on a file system that they share"
        )


def check_alike(grads: Sequence[Tensor], step: int) -> None:
    """Raise ScheduleError unless all processes have the same gradients: where they have not, they have diverged, or
    will, and what they decide differs. One collective.

    Args:
        grads: of all that trains, final.
        step: that they belong to.
    """
    if processes() == 1 or not grads:
        return
    # One that is not finite is another matter, and told as such.
    norms = torch.stack(torch._foreach_norm(list(grads))).double().nan_to_num()
    bounds = torch.cat([norms, -norms])
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    most, least = bounds.chunk(2)
    if not torch.equal(most, -least):
        raise ScheduleError(
            f"the gradients of step {step} differ between processes; wrap the model in DistributedDataParallel after"
            " attach(), and again when tuner.step() returns a selection, because it has replaced parameters"
        )


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()

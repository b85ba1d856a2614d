"""Survivors that no gradient reaches: what is said, also where the loss has no gradient at all and torch complains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from weightlora.errors import AdapterError

_OF_TORCH = "does not require grad"  # what backward() says of a loss that depends on nothing that trains


def no_gradient(names: Sequence[str], step: int) -> AdapterError:
    """The error for survivors `names` that `step` brings no gradient.

    >>> str(no_gradient(["a", "b", "c", "d"], 7))[:51]
    'no gradient reaches a, b, c and 1 more at step 7, a'
    """
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return AdapterError(
        f"no gradient reaches {shown} at step {step}, after the seam: look for reentrant checkpointing in the model's"
        " own code (switch it off, or to use_reentrant=False), for a detached or no_grad part of the forward pass above"
        " it, or for an output that the loss does not use (then leave that module out of target_modules)"
    )


@contextlib.contextmanager
def naming_unreached(survivors: Callable[[], Sequence[str]], step: Callable[[], int]) -> Iterator[None]:
    """Name the survivors where torch says no more than that the loss requires no gradient.

    Args:
        survivors: who should have one; nobody before the seam.
        step: the step that was under way.
    """
    try:
        yield
    except RuntimeError as error:
        names = survivors()
        if not names or _OF_TORCH not in str(error):
            raise
        raise no_gradient(names, step()) from error

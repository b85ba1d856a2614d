"""``python -m weightlora``, for ``torchrun -m weightlora`` and friends."""

from weightlora.cli.main import entry

entry()

"""What the user did wrong, said in one line: what was given, what is allowed, what to do next."""


class WeightLoRAError(ValueError):
    """Base of every error a user can cause. The command line prints it without a traceback and exits with 2.

    Its message is one line whatever names and values of the user's it quotes.

    >>> str(WeightLoRAError("no adapter 'a\\nb'"))
    "no adapter 'a b'"
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ScheduleError(WeightLoRAError):
    """The method cannot run on this model in this many steps."""


class AdapterError(WeightLoRAError):
    """The model has no adapters, the wrong ones, or ones that this operation cannot handle."""


class CheckpointError(WeightLoRAError):
    """A checkpoint, manifest or run directory is damaged, incomplete, or belongs to something else."""


class BusyError(WeightLoRAError):
    """Another process is at work in the directory."""


class DivergedError(WeightLoRAError):
    """A gradient, gate or score is NaN or infinite. ``step`` is the first optimizer step whose gradients were not
    finite (None: the number came from elsewhere)."""

    def __init__(self, message: str, *, step: int | None) -> None:
        super().__init__(message)
        self.step = step


class DataError(WeightLoRAError):
    """A task, data file, column or label is not usable."""


class ExportError(WeightLoRAError):
    """An export cannot be written, or does not reproduce the live model."""


class ConfigError(WeightLoRAError):
    """A setting has a value that is not allowed."""


class BudgetError(WeightLoRAError):
    """Nothing fits into what a run may cost. ``smallest`` is the least that would do, in the budget's unit."""

    def __init__(self, message: str, *, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class PlanError(WeightLoRAError):
    """What was asked for does not fit into the memory given; the message names the nearest thing that does."""

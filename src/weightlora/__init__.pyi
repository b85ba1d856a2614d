"""The public names, each listed here and nowhere else; `__init__` loads them on first use."""

from . import methods as methods
from . import report as report
from . import tasks as tasks
from .errors import WeightLoRAError as WeightLoRAError
from .graft.export import export as export
from .graft.selection import Selection as Selection
from .methods import (
    AdaLoRA as AdaLoRA,
)
from .methods import (
    ALoRA as ALoRA,
)
from .methods import (
    DoRA as DoRA,
)
from .methods import (
    DynamicLoRA as DynamicLoRA,
)
from .methods import (
    FlexLoRA as FlexLoRA,
)
from .methods import (
    Flexora as Flexora,
)
from .methods import (
    HeadOnly as HeadOnly,
)
from .methods import (
    IncreLoRA as IncreLoRA,
)
from .methods import (
    LoRA as LoRA,
)
from .methods import (
    LoRADrop as LoRADrop,
)
from .methods import (
    MELoRA as MELoRA,
)
from .methods import (
    MiLoRA as MiLoRA,
)
from .methods import (
    NoRA as NoRA,
)
from .methods import (
    TiedLoRA as TiedLoRA,
)
from .methods import (
    VBLoRA as VBLoRA,
)
from .methods import (
    VeRA as VeRA,
)
from .methods import (
    WeightLoRA as WeightLoRA,
)
from .methods import (
    WeightLoRAPlus as WeightLoRAPlus,
)
from .methods import (
    method as method,
)
from .training import FitResult as FitResult
from .training import Tuner as Tuner
from .training import attach as attach
from .training import fit as fit

__version__: str

"""The public names of this room, each listed here and nowhere else; `__init__` loads them on first use."""

from .activations import ActivationTrace as ActivationTrace
from .activations import Storage as Storage
from .estimate import Estimate as Estimate
from .estimate import Phase as Phase
from .estimate import PhaseCost as PhaseCost
from .estimate import Setting as Setting
from .estimate import Traced as Traced
from .estimate import divisors as divisors
from .measure import KeptTensors as KeptTensors
from .measure import PeakMemory as PeakMemory
from .measure import StepCost as StepCost
from .measure import counting as counting
from .measure import isolated_rng as isolated_rng
from .measure import kept_bytes as kept_bytes
from .measure import step_cost as step_cost
from .operations import operations as operations
from .placements import placement_costs as placement_costs
from .plan import Plan as Plan
from .plan import Planner as Planner
from .plan_spec import PlanConfig as PlanConfig
from .tracing import trace as trace

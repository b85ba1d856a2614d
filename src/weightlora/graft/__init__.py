"""PEFT: handles, the omega vector, surgery, optimizer state, manifest, export. No other room knows PEFT's inside."""

from weightlora.graft.adapters import Adapter, adapter_name, adapters, block_of, has_adapters, parameters
from weightlora.graft.depth import end_backward_at_lowest
from weightlora.graft.gates import Gates
from weightlora.graft.manifest import MANIFEST, STATE, Manifest
from weightlora.graft.optimizer import Change, remap
from weightlora.graft.selection import Choice, Selection, select
from weightlora.graft.surgery import disconnect, fold, grow_adapters, reshape

__all__ = [
    "MANIFEST",
    "STATE",
    "Adapter",
    "Change",
    "Choice",
    "Gates",
    "Manifest",
    "Selection",
    "adapter_name",
    "adapters",
    "block_of",
    "disconnect",
    "end_backward_at_lowest",
    "fold",
    "grow_adapters",
    "has_adapters",
    "parameters",
    "remap",
    "reshape",
    "select",
]

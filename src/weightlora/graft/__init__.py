"""PEFT: handles, the omega vector, surgery, optimizer state, manifest, export. No other room knows PEFT's inside."""

from weightlora.graft.adapters import Adapter, adapter_name, adapters, block_of, has_adapters, parameters
from weightlora.graft.depth import end_backward_at_lowest
from weightlora.graft.fast import PATHS, PathName, check_path, fast_path, stock_path
from weightlora.graft.gates import Gates
from weightlora.graft.manifest import MANIFEST, STATE, Manifest
from weightlora.graft.optimizer import Change, remap
from weightlora.graft.selection import Choice, Selection, select
from weightlora.graft.surgery import disconnect, fold, grow_adapters, reshape

__all__ = [
    "MANIFEST",
    "PATHS",
    "STATE",
    "Adapter",
    "Change",
    "Choice",
    "Gates",
    "Manifest",
    "PathName",
    "Selection",
    "adapter_name",
    "adapters",
    "block_of",
    "check_path",
    "disconnect",
    "end_backward_at_lowest",
    "fast_path",
    "fold",
    "grow_adapters",
    "has_adapters",
    "parameters",
    "remap",
    "reshape",
    "select",
    "stock_path",
]

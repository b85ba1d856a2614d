"""PEFT: handles, the omega vector, surgery, optimizer state, manifest, export. No other room knows PEFT's inside."""

from weightlora.graft.adapters import (
    Adapter,
    adapter_name,
    adapters,
    base_of,
    block_numbers,
    block_of,
    block_path,
    has_adapters,
    is_adapter,
    is_sharded,
    layer_weights,
    parameters,
    refuse_tied,
    train_heads,
    trained_module,
)
from weightlora.graft.architectures import Blocks, Nest, Offset, Vectors
from weightlora.graft.carried import check_before, uncheckpointed
from weightlora.graft.depth import (
    BackwardDepth,
    GradientCheck,
    checkpoint_blocks,
    checkpointed_every,
    end_backward_at_lowest,
)
from weightlora.graft.directions import input_directions
from weightlora.graft.fast import PATHS, PathName, check_path, fast_path, stock_path
from weightlora.graft.forms import Form, Formed, Gates, Omega, RankGates, scalar_products
from weightlora.graft.manifest import MANIFEST, STATE, Manifest, fingerprint, readable
from weightlora.graft.optimizer import Change, Drop, adopt, arrange, check_groups, forget, group_names, remap
from weightlora.graft.quantised import keep_unpacked, stored, whole_weights
from weightlora.graft.readiness import check_held, check_peft_model, check_ready
from weightlora.graft.rebuild import take_over
from weightlora.graft.selection import Choice, Selection, select
from weightlora.graft.start import load_start_state, moved_by, note_start, start_state
from weightlora.graft.surgery import disconnect, fold, grow_adapters, reshape, resize, restart, tie
from weightlora.graft.tuners import check_tuner, dora_config, save_own_format, tuned_layers, tuner_config, tuner_params
from weightlora.graft.watch import (
    ProductWatch,
    block_features,
    dense_gradients,
    feature_alignment,
    input_size,
    output_energy,
)

__all__ = [
    "MANIFEST", "PATHS", "STATE", "Adapter", "BackwardDepth", "Blocks", "Change", "Choice", "Drop", "Form", "Formed",
    "Gates", "GradientCheck", "Manifest", "Nest", "Offset", "Omega", "PathName", "ProductWatch", "RankGates",
    "Selection", "Vectors", "adapter_name", "adapters", "adopt", "arrange", "base_of", "block_features",
    "block_numbers", "block_of", "block_path", "check_before", "check_groups", "check_held", "check_path",
    "check_peft_model", "check_ready", "check_tuner", "checkpoint_blocks", "checkpointed_every", "dense_gradients",
    "disconnect", "dora_config", "end_backward_at_lowest", "fast_path", "feature_alignment", "fingerprint", "fold",
    "forget", "group_names", "grow_adapters", "has_adapters", "input_directions", "input_size", "is_adapter",
    "is_sharded", "keep_unpacked", "layer_weights", "load_start_state", "moved_by", "note_start", "output_energy",
    "parameters", "readable", "refuse_tied", "remap", "reshape", "resize", "restart", "save_own_format",
    "scalar_products", "select", "start_state", "stock_path", "stored", "take_over", "tie", "train_heads",
    "trained_module", "tuned_layers", "tuner_config", "tuner_params", "uncheckpointed", "whole_weights",
]  # fmt: skip

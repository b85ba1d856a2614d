"""A finished adapter on a base that was built anew."""

from __future__ import annotations

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from weightlora.graft.selection import Selection
from weightlora.graft.start import note_start
from weightlora.graft.surgery import reshape


def take_over(model: nn.Module, source: nn.Module, selection: Selection) -> None:
    """Give a freshly built model the structure and the trained weights, heads included, of a finished one.

    Args:
        model: as the run that made `source` began: the same base, with all its adapters.
        source: what the run ended with; its base may be sharded, and is not looked at.
        selection: what the run kept.
    """
    note_start(model, "default")
    reshape(model, selection)
    trained = get_peft_model_state_dict(source, save_embedding_layers=False)
    set_peft_model_state_dict(model, trained)

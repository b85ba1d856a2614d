"""Reload an export as its user will, and compare logits. Nothing here changes the live model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from weightlora.errors import ExportError
from weightlora.graft.adapters import base_of
from weightlora.graft.start import all_taken

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
PREFIX = "base_model.model."

# Largest difference of logits, as a fraction of max(1, largest logit), by the coarsest dtype in the computation. The
# same numbers multiplied in another order differ by a few units in the last place, and those add up over layers.
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
)
SAMPLE_ROWS, SAMPLE_TOKENS = 8, 16

# PEFT reads the old name of a Transformers property whenever a model is wrapped.
_KNOWN_WARNING = "is_gradient_checkpointing"
# What PEFT and Transformers leave on a model that carries adapters.
_TRACES = ("peft_config", "active_adapter", "_hf_peft_config_loaded")


def plain_base(root: nn.Module) -> nn.Module:
    """The model without its adapters: a copy of the structure over the same storage, so it costs no memory.

    Every LoRA layer is its base layer, with what an initialisation took out of it, and every trained head the untrained
    original. Parameters are new objects, so
    that freezing or replacing them leaves `root` alone; the originals of heads are copies, a head is loaded into them.

    Args:
        root: the base model inside a PeftModel (adapters still on it), or any model.
    """
    memo: dict[int, Any] = {id(p): _alias(p) for p in root.parameters()}
    memo.update({id(buffer): buffer for buffer in root.buffers()})
    # Tensors that are mere attributes (HQQ's bias, which has a history, so that it could not be copied).
    memo.update({id(t): t.detach() for m in root.modules() for t in vars(m).values() if isinstance(t, Tensor)})
    for head in (m.original_module for m in root.modules() if isinstance(m, AuxiliaryTrainingWrapper)):
        memo.update({id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in head.parameters()})
        memo.update({id(buffer): buffer.detach().clone() for buffer in head.buffers()})
    for module in root.modules():
        if isinstance(module, BaseTunerLayer):
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
            for had in all_taken(module):
                linear = memo[id(module)]
                linear.weight = nn.Parameter(linear.weight + had.product(linear), requires_grad=False)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    plain: nn.Module = copy.deepcopy(root, memo)
    for trace in _TRACES:
        plain.__dict__.pop(trace, None)
    return plain


def blank(plain: nn.Module, names: Iterable[str]) -> None:
    """Put zeros in the place of some weights, so that they can only come from the export; ties stay ties."""
    with torch.no_grad():
        for name in names:
            path, _, leaf = name.rpartition(".")
            old = getattr(plain.get_submodule(path), leaf)
            new: Any = torch.zeros_like(old)
            new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            for module in plain.modules():
                for held in (module._parameters, module._buffers):
                    held.update({key: new for key, value in held.items() if value is old})


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    # Quantised parameters are subclasses with state of their own; nobody trains or replaces them.
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[list[warnings.WarningMessage]]:
    """Give random state back, keep third-party bars and reports off the terminal, and collect the warnings."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def spoken(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    """What the collected warnings say, without the one that every wrapped model causes."""
    return tuple(dict.fromkeys(str(w.message) for w in caught if _KNOWN_WARNING not in str(w.message)))


def make_sample(model: nn.Module) -> dict[str, Tensor]:
    """Random token ids that any text model takes: 8 x 16, always the same.

    Special tokens are left out and each row ends with the end-of-sequence token: some classifiers (BART) pool there.
    Without a padding token there is one row, because decoder classifiers refuse more.

    Raises:
        ExportError: the model does not read token ids.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        raise ExportError(
            f"{type(model).__name__} does not read token ids, so no batch can be made up to verify the export; pass"
            " sample=a batch of your data (dict of tensors)"
        )
    text = model.config.get_text_config()
    special = {_first(getattr(text, f"{kind}_token_id", None)) for kind in ("pad", "bos", "eos")}
    allowed = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    pad, eos = (_first(getattr(text, f"{kind}_token_id", None)) for kind in ("pad", "eos"))
    positions = getattr(text, "max_position_embeddings", None) or SAMPLE_TOKENS
    shape = (1 if pad is None else SAMPLE_ROWS, min(SAMPLE_TOKENS, int(positions)))
    ids = allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(0))]
    if eos is not None and 0 <= eos < text.vocab_size:
        ids[:, -1] = eos
    sample = {"input_ids": ids}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        sample["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in accepted:
        sample["decoder_input_ids"] = ids.clone()
    return sample


def _first(token: object) -> int | None:
    value = token[0] if isinstance(token, (list, tuple)) and token else token
    return value if isinstance(value, int) else None


def logits(model: nn.Module, sample: Mapping[str, object]) -> Tensor:
    """The model's logits in evaluation mode, without gradients; every module gets its own mode back.

    Raises:
        ExportError: the model returns no floating tensor.
    """
    device = device_of(model)
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in sample.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        for module, mode in modes:
            module.training = mode
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
        found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 0), None)
    if found is None:
        raise ExportError(f"{type(model).__name__} returns no logits for the sample, so the export cannot be verified")
    return found.detach().clone()


def sample_logits(model: nn.Module, sample: Mapping[str, object] | None) -> tuple[Mapping[str, object], Tensor]:
    """The batch to compare on (made up where none is given) and the live model's logits on it.

    Raises:
        ExportError: the model does not take a made-up batch, or its logits are not finite.
    """
    if sample is None:
        sample = make_sample(model)
        try:
            live = logits(model, sample)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ExportError(
                f"{type(model).__name__} does not take a made-up batch of token ids ({reason}); pass sample=a batch of"
                " your data (dict of tensors)"
            ) from error
    else:
        live = logits(model, sample)
    if live.isnan().any():
        raise ExportError(
            "the model's logits on the sample are NaN, so the export cannot be verified; train again with a lower rate"
        )
    return sample, live


def reload_adapter(plain: nn.Module, folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Open `folder` with stock PEFT on a plain base (a separate head first); returns the model and PEFT's warnings.

    Raises:
        ExportError: the modules that PEFT put adapters on are not those in the file.
    """
    with isolated(plain) as caught:
        if (folder / HEAD).exists():
            unexpected = plain.load_state_dict(load_file(folder / HEAD), strict=False).unexpected_keys
            if unexpected:
                raise ExportError(f"{HEAD} holds {unexpected[0]!r}, which the base model does not have")
        model = PeftModel.from_pretrained(plain, str(folder))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = list(file.keys())
    suffix = ".lora_A.weight"
    written = {key.removeprefix(PREFIX).removesuffix(suffix) for key in keys if key.endswith(suffix)}
    layers = base_of(model).named_modules()
    loaded = {path for path, module in layers if isinstance(module, LoraLayer) and "default" in module.lora_A}
    if written != loaded:
        odd = sorted(written ^ loaded)[0]
        fate = "not loaded" if odd in written else "loaded though not written"
        raise ExportError(f"stock PEFT reads the export differently: {odd!r} is {fate}")
    return base_of(model), spoken(caught)


def save_and_reload(plain: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Write and open `folder` with plain Transformers, in the class and attention implementation of `plain`.

    Raises:
        ExportError: weights are missing from the folder, or are left over.
    """
    with isolated(plain):
        plain.save_pretrained(folder)
        loaded = type(plain).from_pretrained(
            folder, output_loading_info=True, attn_implementation=plain.config._attn_implementation
        )
    model, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ExportError(f"the merged model has {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}")
    return model.to(device_of(plain))  # type: ignore[arg-type,no-any-return]


def compare(live: Tensor, again: Tensor, model: nn.Module) -> tuple[float, float]:
    """Largest difference of logits, and the tolerance for it.

    Raises:
        ExportError: the difference is larger.
    """
    dtypes = {p.dtype for p in model.parameters()} | {live.dtype}
    tolerance = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float32])
    finite = live[live.isfinite()].double()
    tolerance *= max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    if live.shape != again.shape:
        shapes = tuple(again.shape), tuple(live.shape)
        raise ExportError(f"the reloaded export gives logits of shape {shapes[0]}, the live model {shapes[1]}")
    difference = gap(live, again)
    if not difference <= tolerance:
        raise ExportError(
            f"the reloaded export's logits differ from the live model's by {difference:.3g}, more than the tolerance of"
            f" {tolerance:.3g}; nothing was written"
        )
    log.debug("export reloaded: logits differ by %.3g, tolerance %.3g", difference, tolerance)
    return difference, tolerance


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors of one shape; none where both are infinite, as masked logits are."""
    b = b.to(a.device)
    gaps = (a.double() - b.double()).abs().masked_fill(a == b, 0.0)
    return float(gaps.max()) if gaps.numel() else 0.0

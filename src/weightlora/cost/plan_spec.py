"""What a plan may be told."""

from __future__ import annotations

from dataclasses import dataclass

from weightlora.errors import ConfigError
from weightlora.settings import check, setting

DTYPES = ("float32", "bfloat16", "float16")
SHARDINGS = ("ddp", "fsdp", "zero3")
HEADS = ("sequence-classification", "question-answering", "causal-lm", "seq2seq-lm")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say what is planned.

    Args:
        model: a name that :func:`weightlora.tasks.skeletons.skeleton` knows, a hub name, a folder, a config file.
        head, num_labels: what is on top; None: what the config says.
        targets: "all-linear", "attention", "experts" (of a mixture), "vision", or endings of module names,
            comma-separated.
        r: rank of every adapter. k: adapters that survive, a count or a share.
        dtype: of the weights: float32, bfloat16, float16; None: what the config says.
        autocast: float32 weights computing in bfloat16, as ``--bf16`` of the trainer does.
        quantization: "8bit", "4bit" or "4bit-double" (bitsandbytes), or None.
        dropout: of the adapters.
        batch: examples of one optimizer step; a micro-batch divides it. length: tokens per example.
        optimizer: as in ``TrainingArguments.optim``.
        checkpointing: gradient checkpointing of every block.
        engine: "auto", or "stock" for PEFT's own forward.
        device: "cuda" or "cpu": whose kernels for dropout and attention are assumed.
        gated: omega is kept during warm-up.
        devices, sharding: how many train together, and how: "ddp", "fsdp" (FSDP2) or "zero3". All figures are per
            device, batch and micro-batch too.
        lowest: the block of the lowest survivor, 0 = the first; None: the worst case, the first with a target.

    Raises:
        ConfigError: a value that is not allowed.
    """

    model: str = setting(
        "minilm",
        "minilm (default), smollm2, deberta-v3-base, bart-large, llama-3-8b, a hub name, a folder, a config",
    )
    head: str | None = setting(None, f"{', '.join(HEADS)} (default: by the config)", choices=HEADS)
    num_labels: int = setting(2, "number of classes (default: 2)", metavar="N", least=1)
    targets: str = setting(
        "all-linear",
        "layers with adapters: all-linear (default), attention, experts, vision, or endings of module names,"
        " comma-separated",
    )
    r: int = setting(8, "rank of every adapter (default: 8)", least=1)
    k: int | float = setting(0.25, "adapters to keep: a count, or a share such as 0.25 (default: 0.25)", metavar="K")
    lowest: int | None = setting(None, "block of the lowest kept adapter (default: the first block)", metavar="BLOCK")
    dtype: str | None = setting(
        None, f"dtype of the weights: {', '.join(DTYPES)} (default: the config's)", choices=DTYPES
    )
    autocast: bool = setting(False, "compute in bfloat16 over float32 weights, as train's --bf16 does")
    quantization: str | None = setting(None, "quantisation of the frozen weights: 8bit, 4bit or 4bit-double")
    dropout: float = setting(0.05, "LoRA dropout (default: 0.05)", least=0, below=1)
    batch: int = setting(16, "examples per optimizer step (default: 16)", metavar="N", least=1)
    length: int = setting(128, "tokens per example (default: 128)", metavar="N", least=1)
    optimizer: str = setting(
        "adamw_torch", "the optimizer, as --optim of train: adamw_torch (default), sgd, adafactor, adamw_8bit, ..."
    )
    checkpointing: bool = setting(False, "gradient checkpointing of every block")
    engine: str = setting("auto", "code that computes the adapters: auto (default), or stock (PEFT's own)")
    device: str = setting("cuda", "device whose kernels are assumed: cuda (default) or cpu", choices=("cuda", "cpu"))
    devices: int = setting(1, "number of devices; all figures are for one of them (default: 1)", metavar="N", least=1)
    sharding: str = setting(
        "ddp",
        f"how devices share the work: {', '.join(SHARDINGS)} (default: ddp); a model, not measured",
        choices=SHARDINGS,
    )
    gated: bool = setting(True)

    def __post_init__(self) -> None:
        from weightlora.cost.tensors import QUANTIZATIONS, optimizer_bytes

        check(self)
        if self.k <= 0 or (isinstance(self.k, float) and self.k > 1):
            raise ConfigError(f"k={self.k} is not allowed; use a count of 1 or more, or a share such as 0.25")
        optimizer_bytes(self.optimizer, [])  # refuses what it does not know
        if self.quantization not in (None, *QUANTIZATIONS):
            known = ", ".join(QUANTIZATIONS)
            raise ConfigError(f"the quantisation {self.quantization!r} is unknown; use one of {known}")

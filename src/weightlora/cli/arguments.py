"""Flags of the commands: our own by hand, those of ``transformers.TrainingArguments`` under their own names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError

# Flags that set a field of RunConfig of the same name.
TASK_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--task",
        {
            "help": "a GLUE task, squad, squad_v2, xsum, cnn_dailymail, gsm8k, docstrings (embedded, the default),"
            " files (your own labels), or the path of a JSONL file with prompt and completion, or with chats"
        },
    ),
    ("--data-dir", {"help": "folder with TASK/train.jsonl and TASK/validation.jsonl; default: the hub"}),
    ("--train-file", {"help": "CSV or JSONL with your training rows (task files)"}),
    ("--validation-file", {"help": "CSV or JSONL with your validation rows; default: a tenth of the training rows"}),
    ("--text-column", {"help": "column with the text (default: text)"}),
    ("--pair-column", {"help": "column with a second text"}),
    ("--label-column", {"help": "column with the label (default: label)"}),
    ("--regression", {"action": "store_true", "help": "the label is a number to predict"}),
    ("--max-train-samples", {"type": int, "metavar": "N", "help": "train on N random rows"}),
    ("--max-eval-samples", {"type": int, "metavar": "N", "help": "judge by N random rows"}),
    ("--holdout", {"type": float, "metavar": "SHARE", "help": "judge by this share of the training rows instead"}),
    (
        "--split-seed",
        {"type": int, "metavar": "N", "help": "draws the rows of --holdout and --max-...-samples (default: 0)"},
    ),
    (
        "--max-length",
        {"type": int, "metavar": "N", "help": "tokens per input (default: 128; squad 384, summaries 256, text 512)"},
    ),
    (
        "--classify-by",
        {
            "choices": ("head", "answer"),
            "help": "how classes are told: by a new head, or by the answer tokens of a causal model (default: answer"
            " for a pretrained one such as smollm2, else head)",
        },
    ),
    (
        "--prompt",
        {"metavar": "TEXT", "help": "for answer tokens, columns in braces, such as '{sentence}\\nSentiment:'"},
    ),
    (
        "--label-words",
        {"metavar": "CLASS=WORD,...", "help": "the words that answer, where the class's name is none"},
    ),
    ("--doc-stride", {"type": int, "metavar": "N", "help": "squad: tokens that windows share (default: a third)"}),
    ("--max-answer-length", {"type": int, "metavar": "N", "help": "squad: tokens per answer (default: 30)"}),
    (
        "--null-score-diff-threshold",
        {"type": float, "metavar": "X", "help": "squad_v2: how far 'no answer' must lead to be given (default: 0)"},
    ),
    (
        "--max-target-length",
        {"type": int, "metavar": "N", "help": "tokens per summary (default: 160) or generated answer (gsm8k: 256)"},
    ),
)
MODEL_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--model", {"help": "minilm (default), smollm2, a small shape such as bert-tiny-shape, a hub name, or a folder"}),
    ("--targets", {"help": "all-linear (default), attention, or endings of module names, comma-separated"}),
    ("--r", {"type": int, "help": "rank of every adapter (default: 8)"}),
    ("--alpha", {"type": float, "help": "LoRA alpha (default: 32)"}),
    ("--dropout", {"type": float, "help": "LoRA dropout (default: 0.05)"}),
    (
        "--params",
        {"metavar": "N", "help": "adapter parameters to spend, such as 123k: sets rank or K of the method"},
    ),
    ("--seed", {"type": int, "help": "of everything random (default: 0)"}),
    (
        "--micro-batch",
        {"type": int, "metavar": "N", "help": "examples per forward pass until the seam; the effective batch is held"},
    ),
    (
        "--engine",
        {"help": "how adapters compute: auto (default), autograd, triton, reference, or stock (PEFT's own forward)"},
    ),
    ("--final-micro-batch", {"type": int, "metavar": "N", "help": "examples per forward pass after the seam"}),
)
# Flags that set a field of the method, where it has it.
METHOD_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--k", {"metavar": "K", "help": "adapters to keep: a count, or a share such as 0.25 (default: 0.25)"}),
    (
        "--memory",
        {"metavar": "SIZE", "help": "instead of K: bytes that the whole run may take, such as 12GiB (weightlora)"},
    ),
    (
        "--step-time",
        {"metavar": "SHARE", "help": "instead of K: operations of a step after T, such as 0.6x of one before"},
    ),
    (
        "--select-after",
        {"metavar": "T", "help": "steps before the rest is disconnected, or a share of the run (default: 0.15)"},
    ),
    (
        "--adapter-rate",
        {"type": float, "metavar": "X", "help": "the adapters' learning rate over the head's (default: the method's)"},
    ),
    (
        "--b-rate",
        {"type": float, "metavar": "X", "help": "the learning rate of B over A's, as LoRA+ has it (default: 1)"},
    ),
    ("--score", {"help": "what is ranked: omega, credit or coverage"}),
    ("--gate-lr", {"type": float, "help": "learning rate of omega"}),
    ("--growth", {"help": "gaussian or qr (weightlora+)"}),
    ("--max-rank", {"type": int, "help": "cap on grown ranks (weightlora+)"}),
)

# Flags of `plan`; their defaults live in PlanConfig.
PLAN_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--model",
        {"help": "minilm (default), smollm2, deberta-v3-base, bart-large, llama-3-8b, a hub name, a folder, a config"},
    ),
    (
        "--head",
        {"help": "sequence-classification, question-answering, causal-lm, seq2seq-lm (default: by the config)"},
    ),
    ("--num-labels", {"type": int, "metavar": "N", "help": "of a classification (default: 2)"}),
    ("--targets", {"help": "all-linear (default), attention, or endings of module names, comma-separated"}),
    ("--r", {"type": int, "help": "rank of every adapter (default: 8)"}),
    ("--k", {"metavar": "K", "help": "survivors: a count, or a share such as 0.25 (default: 0.25)"}),
    ("--lowest", {"type": int, "metavar": "BLOCK", "help": "block of the lowest survivor (default: the worst case)"}),
    ("--dtype", {"help": "of the weights: float32, bfloat16 or float16 (default: what the config says)"}),
    (
        "--autocast",
        {"action": "store_true", "help": "compute in bfloat16 over float32 weights, as train's --bf16 does"},
    ),
    ("--quantization", {"help": "of frozen weights: 8bit, 4bit or 4bit-double"}),
    ("--dropout", {"type": float, "help": "LoRA dropout (default: 0.05)"}),
    ("--batch", {"type": int, "metavar": "N", "help": "examples per optimizer step (default: 16)"}),
    ("--length", {"type": int, "metavar": "N", "help": "tokens per example (default: 128)"}),
    ("--optimizer", {"help": "as --optim of train: adamw_torch (default), sgd, adafactor, adamw_8bit, ..."}),
    ("--checkpointing", {"action": "store_true", "help": "gradient checkpointing of every block"}),
    ("--engine", {"help": "auto (default), or stock for PEFT's own forward"}),
    ("--device", {"help": "whose kernels are assumed: cuda (default) or cpu"}),
)
# Flags without a value: in a recipe, `false` is the same as leaving them out.
SWITCHES = ("--regression", "--overwrite", "--dry-run")
# A recipe's section for the command of that name alone; see docs/reproduce.md.
REPRODUCE = "reproduce"


def dashed(words: Sequence[str]) -> list[str]:
    """``--max_steps`` and ``--max-steps`` are one flag.

    >>> dashed(["--data_dir", "my_data", "--k=3"])
    ['--data-dir', 'my_data', '--k=3']
    """
    flags = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name.replace("_", "-") + equals + value for name, equals, value in flags]


def add_flags(parser: Any, flags: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Add flags whose absence leaves no trace in the namespace, so that defaults live in one place only."""
    for flag, options in flags:
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Everything that defines a plan."""
    add_flags(parser, PLAN_FLAGS)
    parser.add_argument("--memory", metavar="SIZE", help="what there is, such as 16GiB: find what fits, or refuse")
    parser.add_argument("--layers", action="store_true", help="show what each block keeps, too")
    parser.add_argument(
        "--probe", action="store_true", help="run one step on random weights, and correct the plan by it"
    )


def plan_config(parsed: argparse.Namespace) -> Any:
    """The PlanConfig that the flags describe."""
    from dataclasses import fields

    from weightlora.cost import PlanConfig

    given = {f.name: getattr(parsed, f.name) for f in fields(PlanConfig) if f.name in vars(parsed)}
    if "k" in given:
        given["k"] = number(given["k"], "k")
    return PlanConfig(**given)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Everything that defines a run."""
    add_flags(parser.add_argument_group("task"), TASK_FLAGS)
    add_flags(parser.add_argument_group("model and adapters"), MODEL_FLAGS)
    group = parser.add_argument_group("method")
    add_flags(group, (("--preset", {"help": "recommended (default), paper or official"}), *METHOD_FLAGS))
    parser.epilog = (
        (parser.epilog or "") + "\nRECIPE.yaml holds flags as YAML (task: sst2); the command line has the last word."
        "\nevery flag of transformers.TrainingArguments works too, under its own name: --learning_rate 3e-4,"
        "\n--max-steps 200, --per_device_train_batch_size 8, --bf16, --gradient_checkpointing, --report_to ..."
    )


def read_recipe(path: str) -> list[str]:
    """A YAML mapping of flags as command-line words.

    Raises:
        ConfigError: no such file, no YAML, or no mapping of flags to plain values.
    """
    data = _read_yaml(path)
    data.pop(REPRODUCE, None)
    return flag_words(data)


def read_section(path: str) -> dict[str, Any]:
    """What a recipe says to `reproduce` alone."""
    section = _read_yaml(path).get(REPRODUCE)
    if not isinstance(section, dict):
        raise ConfigError(f"the recipe {path} has no section `{REPRODUCE}:`; see docs/reproduce.md")
    return section


def _read_yaml(path: str) -> dict[Any, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the recipe {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the recipe {path} must map flags to values, such as `task: sst2`")
    return data


def flag_words(data: Mapping[Any, Any]) -> list[str]:
    """A mapping of flags as command-line words.

    >>> flag_words({"max_steps": 9, "seeds": [0, 1], "bf16": True, "tasks": [{"task": "cola"}]})
    ['--max-steps', '9', '--seeds', '0,1', '--bf16', '--tasks', '[{"task": "cola"}]']
    """
    words: list[str] = []
    for key, value in data.items():
        flag = "--" + str(key).replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list):
            words += [flag, ",".join(map(str, value))]
        elif value is False and flag in SWITCHES:
            continue
        elif value is not None:
            words += [flag, str(value)]
    return words


def without(words: Sequence[str], *flags: str) -> list[str]:
    """Words less some flags and the value of each.

    >>> without(["--seed", "1", "--task", "cola", "--methods=lora"], "--task", "--methods")
    ['--seed', '1']
    """
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in flags:
            next(rest, None)
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def number(text: str, what: str) -> int | float:
    """A count or a share.

    >>> number("9", "k"), number("0.25", "k")
    (9, 0.25)
    """
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{what}={text!r} is no number; use a count or a share such as 0.25") from None


def whole(text: str, what: str) -> int:
    """A whole number of 0 or more."""
    if not text.strip().isdecimal():
        raise ConfigError(f"{what}={text!r} is no whole number; use for example 0,1,2")
    return int(text)


def training_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The fields of ``TrainingArguments`` that were named on the command line; anything else is a usage error."""
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

    kind: Any = Seq2SeqTrainingArguments
    known = HfArgumentParser(kind, add_help=False, allow_abbrev=False)
    known.error = parser.error  # type: ignore[method-assign]  # one usage line: ours
    for action in known._actions:
        action.default = argparse.SUPPRESS
    found, rest = known.parse_known_args(list(words))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return vars(found)


def run_config(parsed: argparse.Namespace, rest: Sequence[str], parser: argparse.ArgumentParser, method: str) -> Any:
    """The RunConfig that the flags describe."""
    from dataclasses import fields

    from weightlora.methods import METHODS
    from weightlora.runs.config import RunConfig

    given = vars(parsed)
    values = {
        f.name: given[f.name] for f in fields(RunConfig) if f.name in given and f.name not in ("method", "settings")
    }
    settings: dict[str, Any] = {}
    for flag, _ in METHOD_FLAGS:
        key = flag[2:].replace("-", "_")
        if key in given:
            settings[key] = given[key]
    for key in ("k", "select_after"):
        if key in settings:
            settings[key] = number(settings[key], key)
    if method in METHODS:
        own = METHODS[method].settings()
        # `--k 9` in a script over all methods must not stop the ones that have no K.
        settings = {key: value for key, value in settings.items() if key in own or key != "k"}
    training = training_flags(rest, parser)
    return RunConfig(**values, method=method, settings=settings, training=training)

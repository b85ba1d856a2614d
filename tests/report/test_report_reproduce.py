"""Commands are given to the command line again, configurations to PEFT: both must come out as they went in."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tests.report.conftest import make_record

from weightlora.cli.flags import dashed, given_settings
from weightlora.cli.main import command_parser
from weightlora.graft.selection import Choice, Selection
from weightlora.report.reproduce import alone, lora_config, started_with
from weightlora.runs.record import Record
from weightlora.runs.spec import RunSpec

Make = Callable[..., Record]


def config_of(words: list[str]) -> RunSpec:
    """What the command line makes of a `train` command."""
    parser = command_parser("train")
    parsed, rest = parser.parse_known_args(dashed(words[2:]))
    return RunSpec.of(given_settings(parsed, rest, parser))


@pytest.mark.parametrize(
    "words",
    [
        "train",
        "train --task sst2 --data-dir 'my data' --k 0.25 --select-after 38 --max-steps 250 --learning-rate 3e-4",
        "train --method weightlora+ --preset paper --growth qr --max-rank 64 --warmup-steps 0.1 --seed 7",
        "train --method full --task files --train-file a.csv --label-column 'my label' --regression --bf16",
        "train --method random --micro-batch 4 --final-micro-batch 8 --targets query,value --r 4 --alpha 8 --dropout 0",
        """train --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr": 1e-5}' --report_to wandb""",
        "train --gradient_checkpointing --save_strategy no --max_grad_norm 0.5 --weight-decay 0.01",
    ],
)
def test_the_command_of_a_run_alone_makes_the_same_run(words: str, make: Make) -> None:
    config = config_of(["weightlora", *shlex.split(words)])
    stored = json.loads(json.dumps(config.to_dict()))
    again = read_by_a_shell(alone(make(config=stored)))
    assert again[:2] == ["weightlora", "train"]
    assert config_of(again) == config


def test_a_run_of_a_comparison_is_told_apart_from_the_comparison(make: Make) -> None:
    config = config_of(["weightlora", "train", "--method", "top", "--seed", "2"])
    record = make(config=config.to_dict(), argv=("/opt/bin/weightlora", "compare", "--seeds", "0,1,2"))
    assert started_with(record) == "weightlora compare \\\n  --seeds 0,1,2"
    assert "--method top" in alone(record)
    assert "--seed 2" in alone(record)
    assert alone(make(config={})) == ""


def read_by_a_shell(command: str) -> list[str]:
    """The words that bash hands to the program."""
    script = f"weightlora() {{ printf '%s\\0' weightlora \"$@\"; }}\n{command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]


words_of_a_shell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(words_of_a_shell | words_of_a_shell.map("-{}".format), max_size=8))
def test_a_shell_reads_the_words_that_were_given(words: list[str]) -> None:
    record = make_record("one", argv=("weightlora", *words))
    assert read_by_a_shell(started_with(record)) == ["weightlora", *words]


def test_a_record_without_a_command_shows_none(make: Make) -> None:
    assert started_with(make("one", argv=())) == ""


def selection(ranks: list[int], scale: float = 4.0) -> Selection:
    choices = tuple(
        Choice(name=f"layer.{n}.query", kept=rank > 0, omega=1.0, score=None, rank=max(rank, 1), scale=scale)
        for n, rank in enumerate(ranks)
    )
    return Selection(method="top", preset="recommended", step=0, why="", choices=choices)


def evaluated(text: str) -> dict[str, Any]:
    """The fields of the LoraConfig that a snippet of ours makes."""
    names: dict[str, Any] = {}
    exec(text, names)
    made: LoraConfig = names["config"]
    return plain(made)


def plain(config: LoraConfig) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return data | {"target_modules": sorted(data["target_modules"]), "inference_mode": False}


@pytest.mark.parametrize("ranks", [[8, 0, 8], [0, 0, 3], [8, 4, 0, 2]])
def test_the_configuration_is_the_one_of_the_adapter(ranks: list[int], make: Make, tmp_path: Path) -> None:
    config = selection(ranks).lora_config(task_type="SEQ_CLS", lora_dropout=0.05, modules_to_save=["classifier"])
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert evaluated(lora_config(make(), stored)) == plain(config)
    assert lora_config(make(), stored | {"peft_type": "VERA"}) == "", "no LoRA, so no LoraConfig"


def test_a_record_alone_gives_what_it_knows(make: Make) -> None:
    record = make("bert", k=3, config={"r": 8, "alpha": 32.0, "dropout": 0.1})
    made = evaluated(lora_config(record, None))
    assert made["target_modules"] == sorted(entry.name for entry in record.kept)
    assert (made["r"], made["lora_alpha"], made["lora_dropout"]) == (8, 32.0, 0.1)
    grown = tuple(dataclasses.replace(entry, rank=rank) for entry, rank in zip(record.kept, (8, 8, 19), strict=True))
    text = lora_config(dataclasses.replace(record, kept=grown), None)
    assert evaluated(text)["rank_pattern"] == {grown[0].name: 8, grown[1].name: 8}
    assert "# lora_alpha is not in the record" in text
    assert lora_config(make(kept=(), adapters=(), n_adapters=0), None) == ""

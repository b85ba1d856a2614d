"""``memory``: every counted point against a model built with those adapters alone, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.runs.commands import TINY, read, read_rows, weightlora
from transformers import DataCollatorWithPadding

from weightlora.cost.measure import kept_bytes
from weightlora.errors import ConfigError
from weightlora.graft.fast import fast_path
from weightlora.report.memory_plot import memory_plot
from weightlora.tasks import load_model

BATCH = 8


def measured(data: Path, names: list[str], rank: int, path: str) -> tuple[int, int]:
    """Kept bytes and all of a run with these adapters, measured on a real forward pass."""
    loaded = load_model("bert-tiny-shape", num_labels=2, labels=("negative", "positive"))
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, lora_dropout=0.05, target_modules=names, task_type="SEQ_CLS",
        modules_to_save=list(loaded.heads),
    )  # fmt: skip
    model: Any = get_peft_model(loaded.model, config).train()
    if path == "ours":
        fast_path(model)
    rows = [
        {**loaded.tokenizer(row["sentence"], truncation=True, max_length=24), "labels": row["label"]}
        for row in read_rows(data / "sst2" / "train.jsonl")
    ]
    rows.sort(key=lambda row: -len(row["input_ids"]))
    batch = DataCollatorWithPadding(loaded.tokenizer)([*rows[: BATCH - 1], rows[-1]])
    kept = kept_bytes(model, lambda: model(**batch).loss)
    parameters = list(model.parameters())
    total = sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers()))
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
        total += p.numel() * p.element_size()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return kept, total + kept + sum(t.numel() * t.element_size() for t in state)


def test_counted_is_what_a_run_with_these_adapters_holds(small_data: Path, tmp_path: Path) -> None:
    words = ("memory", *TINY, "--task", "sst2", "--data-dir", small_data, "--ranks", "2,8", "--points", "4")
    assert weightlora(*words, "--limit", "64MiB", "--out", tmp_path / "out", "--json", tmp_path / "too.json") == 0
    data = read(tmp_path / "out" / "memory.json")
    assert data == read(tmp_path / "too.json")
    assert (tmp_path / "out" / "memory.png").stat().st_size > 10_000
    assert (data["n_adapters"], data["micro_batch"], data["length"], data["limit_bytes"]) == (12, BATCH, 24, 2**26)
    assert len(data["records"]) == 2 * 2 * 2 * 4
    names = list(load_model("bert-tiny-shape", num_labels=2).linear_targets)
    deepest = [r for r in data["records"] if r["order"] == "deepest" and r["k"]]
    for record in deepest:
        kept, total = measured(small_data, names[-record["k"] :], record["rank"], record["path"])
        assert (record["kept_activation_bytes"], record["total_bytes"]) == (kept, total), record
    for record in data["records"]:
        twin = next(r for r in data["records"] if all(r[k] == record[k] for k in ("order", "k", "rank")))
        if record["path"] == "stock" and twin["path"] == "ours":
            assert twin["total_bytes"] <= record["total_bytes"] + 8 * record["k"]
    for order in ("deepest", "random"):
        line = [r["total_bytes"] for r in data["records"] if (r["order"], r["rank"], r["path"]) == (order, 8, "ours")]
        assert line == sorted(line)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ranks", "8,8"), "must be different ranks"),
        (("--ranks", "0"), "must be different ranks of 1 or more"),
        (("--points", "1"), "points=1 is not allowed"),
        (("--limit", "lots"), "'lots' is not a number of bytes"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weightlora("memory", *TINY, *flags, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_picture_refuses_another_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the JSON of `weightlora memory`"):
        memory_plot({"records": []}, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()

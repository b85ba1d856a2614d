"""Writes what this release leaves on disk, for later releases to load: ``python -m tests.releases.make``.

The folder is named after the version. Until that is released it is made anew whenever a format changes; then never.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_model, save_model
from tests.builders import lora, trainer
from tests.runs.commands import write_rows
from transformers import Trainer

import weightlora
from weightlora.graft.export import export
from weightlora.methods import Method, WeightLoRAPlus
from weightlora.training import fit

HERE = Path(__file__).parent
METHOD: Method = WeightLoRAPlus.from_preset("paper", k=2, select_after=4)
SENTENCES = (
    "the loop reads a file", "a server sends one packet", "the list of numbers is sorted", "a key opens the socket",
    "the parser splits a line", "a client waits for an answer", "the values are added up", "a connection is closed",
)  # fmt: skip
COMMAND = (
    "train", "--task", "files", "--train-file", "train.jsonl", "--validation-file", "validation.jsonl", "--model",
    "bert-tiny-shape", "--max-length", "16", "--method", "weightlora+", "--k", "3", "--select-after", "4",
    "--max-steps", "8", "--save-steps", "5", "--per-device-train-batch-size", "4",
)  # fmt: skip


def stored_trainer(out: Path, base: Path) -> Trainer:
    """A trainer of eight steps on the stored base; random numbers of another torch do not matter but for dropout."""
    model = lora(dropout=0.0)
    if base.is_file():
        load_model(model, base)
    else:
        save_model(model, str(base))
    return trainer(out, model, steps=8, save_strategy="steps", save_steps=3)


def main() -> None:
    folder = HERE / weightlora.__version__
    folder.mkdir()
    os.chdir(folder)  # what is written must not name a folder of this machine
    result = fit(stored_trainer(Path("fit"), Path("model.safetensors")), METHOD, measure=False)
    export(result, "adapter")
    # A command that ends, and one that is killed after the seam.
    write_rows(Path("train.jsonl"), [{"text": text, "label": i % 2} for i, text in enumerate(SENTENCES * 2)])
    write_rows(Path("validation.jsonl"), [{"text": text, "label": i % 2} for i, text in enumerate(SENTENCES)])
    words = [sys.executable, "-m", "weightlora", *COMMAND]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*words, "--out", "whole"], env=environment, check=True)
    killed = subprocess.Popen([*words, "--out", "killed"], env=environment)
    while not Path("killed/checkpoints/seam-4").is_dir():
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    # The tokenizer is large and no file of this project; the seam's checkpoint has none and is enough to go on from.
    shutil.rmtree("whole/checkpoints")
    Path("whole/selection.png").unlink()
    for folder in Path("killed/checkpoints").glob("checkpoint-*"):
        shutil.rmtree(folder)
    for lock in Path().glob(".*.lock"):
        lock.unlink()


if __name__ == "__main__":
    main()

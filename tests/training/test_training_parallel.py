"""Two processes with half a batch each are one process with the whole batch: in everything, killed or not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.builders import a_third, long, lora, max_difference, trainer
from tests.forks import ROOT, Forks
from tests.runs.commands import labelled
from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.graft.selection import Selection
from weightlora.methods import METHODS, AdapterMethod, LoRA
from weightlora.methods.placements.by_hand import PartPlacement
from weightlora.runs.record import Record
from weightlora.training import fit

# float32: a mean over a batch is a mean of means, its last bits differ, and 12 steps of Adam at 1e-2 carry that on.
FP32 = 1e-5
# Omega learns at rate 5 and is float32 in every run.
OMEGA = 1e-5
SHARDED = {"fsdp": True}
WHOLE = {"per_device_train_batch_size": 8}


class Together(Forks):
    """Jobs of several processes; see ``parallel_run.py``."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).with_name("parallel_run.py"))

    def codes(self, out: Path, **job: Any) -> list[int]:
        """Exit codes of a job's processes."""
        out.mkdir(parents=True, exist_ok=True)
        found: list[int] = self.ask({"out": str(out), "method": "weightlora+", **job})
        return found

    def do(self, out: Path, processes: int = 2, **job: Any) -> Path:
        """A job that goes well; every process must end with the very same adapter and selection."""
        codes = self.codes(out, processes=processes, **job)
        assert codes == [0] * processes, said(out)
        for rank in range(1, processes):
            assert max_difference(adapter(out), adapter(out, rank)) == 0.0
            chose = [(out / f"selection-{each}.json").is_file() for each in (0, rank)]
            assert chose[0] == chose[1]
            assert not chose[0] or selection(out) == selection(out, rank)
        return out

    def refused(self, out: Path, processes: int = 2, **job: Any) -> str:
        """What every process of a job is refused with."""
        codes = self.codes(out, processes=processes, **job)
        assert codes == [2] * processes, said(out)
        return (out / "output-0.txt").read_text()


def said(out: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(out.glob("output-*.txt")))


def adapter(out: Path, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(out / f"adapter-{rank}.pt", weights_only=True)
    return found


def selection(out: Path, rank: int = 0) -> Selection:
    return Selection.load(out / f"selection-{rank}.json")


def same(a: Path, b: Path, tolerance: float) -> None:
    """Two results of different numbers of processes."""
    assert selection(a).names == selection(b).names
    omegas = [[choice.omega for choice in selection(out).choices] for out in (a, b)]
    assert omegas[0] == pytest.approx(omegas[1], abs=OMEGA)
    assert max_difference(adapter(a), adapter(b)) <= tolerance


@pytest.fixture(scope="module")
def together() -> Iterator[Together]:
    made = Together()
    with made.until_done():
        yield made


@pytest.fixture(scope="module")
def one(together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the whole batch: warm-up, growth, to the end."""
    return together.do(tmp_path_factory.mktemp("one"), 1, arguments=WHOLE)


@pytest.fixture(scope="module")
def two(together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that nobody disturbed, with half of it each."""
    return together.do(tmp_path_factory.mktemp("two"))


def test_two_processes_decide_and_train_as_one(one: Path, two: Path) -> None:
    seen = [json.loads((out / "seen-0.json").read_text()) for out in (one, two)]
    assert [(s["processes"], s["step"]) for s in seen] == [(1, 12), (2, 12)]
    same(one, two, FP32)
    assert {choice.rank for choice in selection(two).kept} == {12}  # grown


# Placements by hand find no part of theirs on q, k and v; they are `top` by other names. The others look by the code of
# those that are here; `kappatune` (it reads weights) and `eva` (PEFT's own) have ways of their own.
@pytest.mark.parametrize(
    "name",
    a_third(
        [name for name, kind in METHODS.items()
         if kind.learns and not issubclass(kind, PartPlacement) and name not in ("domlora", "plop", "aletheia")],
        first=0,
    ),
)  # fmt: skip
def test_every_method(together: Together, tmp_path: Path, name: str) -> None:
    """One process is two: with the base in parts where the method can, whole otherwise."""
    whole_base = not issubclass(METHODS[name], AdapterMethod) or name in ("nora", "milora")
    arguments = {} if whole_base else SHARDED
    alone = together.do(tmp_path / "one", 1, method=f"any {name}", arguments=WHOLE)
    two = together.do(tmp_path / "two", method=f"any {name}", arguments=arguments)
    assert json.loads((two / "seen-0.json").read_text())["sharded"] == (False if whole_base else 41)
    ends = [{key: t for key, t in adapter(out).items() if "key.bias" not in key} for out in (alone, two)]
    # Softmax does not see a key's bias: its gradient is rounding, which Adam scales.
    assert max_difference(*ends) <= FP32
    if issubclass(METHODS[name], AdapterMethod):
        assert selection(alone).names == selection(two).names
    if whole_base:
        told = together.refused(tmp_path / "no", method=f"any {name}", arguments=SHARDED)
        assert ("run it without FSDP" if issubclass(METHODS[name], AdapterMethod) else "or by torchrun (DDP)") in told


@pytest.mark.parametrize(("kind", "sharded"), [("4bit", True), ("8bit", False), *long(("4bit", False), ("8bit", True))])
def test_a_quantised_base(together: Together, tmp_path: Path, kind: str, sharded: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: it is not tested with several processes")
    alone = together.do(tmp_path / "one", 1, base=kind, arguments=WHOLE)
    two = together.do(tmp_path / "two", base=kind, arguments=SHARDED if sharded else {})
    same(alone, two, FP32)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_trls_dpo(together: Together, tmp_path: Path, sharded: bool) -> None:
    pytest.importorskip("trl", reason="NO TRL: its trainers are not tested with several processes")
    alone = together.do(tmp_path / "one", 1, kind="dpo", arguments={"per_device_train_batch_size": 8})
    two = together.do(tmp_path / "two", kind="dpo", arguments=SHARDED if sharded else {})
    same(alone, two, FP32)


def test_held_out_rows_are_the_same_everywhere(together: Together, tmp_path: Path) -> None:
    alone = together.do(tmp_path / "one", 1, method="flexora", arguments=WHOLE)
    same(alone, together.do(tmp_path / "two", method="flexora"), FP32)


def test_a_sharded_base_changes_nothing(together: Together, two: Path, tmp_path: Path) -> None:
    """FSDP2: every frozen weight lies in parts, and no bit of the result is another."""
    sharded = together.do(tmp_path, arguments=SHARDED)
    seen = json.loads((sharded / "seen-0.json").read_text())
    assert seen == {"processes": 2, "step": 12, "sharded": 41}
    assert json.loads((two / "seen-0.json").read_text())["sharded"] is False
    same(two, sharded, 0.0)


@pytest.mark.parametrize(("dies", "sharded"), [(5, False), (8, True)], ids=["warmup", "grown-sharded"])
def test_one_process_is_killed(
    together: Together, one: Path, two: Path, tmp_path: Path, dies: int, sharded: bool
) -> None:
    """In warm-up after a checkpoint, or after growth. The run goes on with two processes, or with one."""
    arguments = SHARDED if sharded else {}
    killed = tmp_path / "killed"
    codes = together.codes(killed, processes=2, dies=dies, arguments=arguments)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 2)
    assert not (killed / "adapter-0.pt").exists()
    shutil.copytree(killed, tmp_path / "alone")
    same(two, together.do(killed, resume=True, arguments=arguments), 0.0)
    resumed = together.do(tmp_path / "alone", 1, resume=True)  # with the arguments of two: accumulation follows
    assert "was made by 2 processes and goes on with 1, 4 x 2 examples" in said(resumed)
    same(two, resumed, FP32)
    same(one, resumed, FP32)


def test_one_process_is_killed_and_two_go_on(together: Together, one: Path, tmp_path: Path) -> None:
    codes = together.codes(tmp_path, processes=1, dies=8, arguments=WHOLE)
    assert codes == [-signal.SIGKILL]
    resumed = together.do(tmp_path, resume=True, arguments=WHOLE)
    assert "was made by 1 processes and goes on with 2, 4 x 1 examples" in said(resumed)
    same(one, resumed, FP32)


def test_what_cannot_go_on_as_it_began(together: Together, two: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(two / "run" / "checkpoint-4", tmp_path / name / "run" / "checkpoint-4")
        return tmp_path / name

    story = together.refused(copy("three"), 3, resume=True)
    assert "8 examples in a step, over 2 processes; this run has 12, over 3" in story
    story = together.refused(copy("larger"), resume=True, arguments=WHOLE)
    assert "8 examples in a step, over 2 processes; this run has 16, over 2" in story
    # A random state that its process had no time to write: an earlier checkpoint would be taken, here there is none.
    missing = copy("missing")
    (missing / "run" / "checkpoint-4" / "rng_state_1.pth").unlink()
    assert "checkpoint-4: rng_state_1.pth is missing" in together.refused(missing, resume=True)


def test_sums_over_micro_batches_are_not_resumed_as_means(together: Together, tmp_path: Path) -> None:
    """A trainer of one process adds micro-batches up where the model ignores their number; two average them."""
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert together.codes(tmp_path, processes=1, dies=8, arguments=arguments) == [-signal.SIGKILL]
    other = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert "accumulation = 4 and no micro_batch" in together.refused(tmp_path, resume=True, arguments=other)


def test_omega_is_reduced_once_per_optimizer_step(together: Together, tmp_path: Path) -> None:
    """Every collective of a run with accumulation, between optimizer steps; DDP's own are among them."""
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ddp_find_unused_parameters": False,
    }
    together.do(tmp_path, kind="counted", method="three", arguments=arguments)
    for rank in (0, 1):
        noted = json.loads((tmp_path / f"collectives-{rank}.json").read_text())
        steps: list[list[int]] = [[]]
        for name, numbers in noted:
            if name == "step":
                steps.append([])
            elif name.startswith(("allreduce", "reduce")):
                steps[-1].append(numbers)
        # 6 adapters of rank 4 on 16 x 16 and a head of 34, in one bucket; 6 omegas until the seam.
        # Once: the two numbers by which processes see that they begin the same run, the loss so far in each checkpoint.
        first, last = [6 * 4 * 32 + 34, 6], [3 * 8 * 32 + 34]
        assert steps == [
            [2, *first], *[first] * 3, [1, *first], [1, *last], *[last] * 2, [1, *last], *[last] * 3, [1]
        ]  # fmt: skip


def test_a_loop_of_ones_own(together: Together, tmp_path: Path) -> None:
    alone = together.do(tmp_path / "one", 1, kind="loop", wrapped=2)
    same(alone, together.do(tmp_path / "two", kind="loop", wrapped=2), FP32)
    assert "gradients of step 4 differ between processes" in together.refused(tmp_path / "once", kind="loop", wrapped=1)


def test_the_launcher_asks_for_sharding(together: Together, tmp_path: Path) -> None:
    """What `accelerate launch` with an FSDP2 configuration sets; Accelerate itself passes over it on CPUs."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
             "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}  # fmt: skip
    together.do(tmp_path, environment=asked, arguments={"max_steps": 6})
    assert json.loads((tmp_path / "seen-0.json").read_text())["sharded"] == 41
    loads = {**asked, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert "leaves most processes without weights" in together.refused(tmp_path, environment=loads)


@pytest.mark.parametrize(("config", "method", "message"), [
    ({"cpu_offload": True}, "weightlora+", "FSDP's cpu_offload is not supported"),
    ({"activation_checkpointing": True}, "weightlora+", "use gradient_checkpointing=True instead"),
    ({}, "any full", "full runs on one process, or by torchrun"),
    ({}, "milora", "milora reads the base's weights, which FSDP shards"),
    ({}, "memory", "memory is counted on a whole base, which FSDP shards"),
], ids=["offload", "checkpointing", "full", "milora", "budget"])  # fmt: skip
def test_sharding_that_is_refused(
    together: Together, tmp_path: Path, config: dict[str, Any], method: str, message: str
) -> None:
    assert message in together.refused(tmp_path, method=method, arguments={**SHARDED, "fsdp_config": config})


def test_processes_that_nobody_connected(together: Together, tmp_path: Path) -> None:
    """On a machine without a GPU Accelerate connects processes only if it is told to stay on the CPU."""
    story = together.refused(tmp_path, arguments={"use_cpu": False})
    assert "2 processes were started, but each would train alone" in story


def test_engines_that_are_refused(tmp_path: Path) -> None:
    flat = trainer(tmp_path)
    flat.args.fsdp_plugin_args = {"fsdp_version": 1}  # which Accelerate takes on a GPU only
    with pytest.raises(ConfigError, match="FSDP1 puts adapters and base into one flat parameter"):
        fit(flat, LoRA())
    several = trainer(tmp_path)
    several.args._n_gpu = 2  # what Transformers notes where it sees two GPUs in one process
    with pytest.raises(ConfigError, match="DataParallel is not supported: start one process per GPU with torchrun"):
        fit(several, LoRA())
    scaled = trainer(tmp_path)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match=r"fp16 training scales the gradients.*; use bf16"):
        fit(scaled, LoRA())
    assert not list(tmp_path.iterdir())


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    """By Transformers where it is not installed; by fit where it is."""
    arguments: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ImportError, match=r"(?i)deepspeed"):
            trainer(tmp_path, **arguments)
    else:
        with pytest.raises(ConfigError, match=r"DeepSpeed is not supported.*torchrun"):
            fit(trainer(tmp_path, lora(), **arguments), LoRA())


COMMAND = (
    "--task", "docstrings", "--max-train-samples", "64", "--max-eval-samples", "16", "--model", "bert-tiny-shape",
    "--max-length", "24", "--method", "weightlora+", "--k", "3", "--select-after", "4", "--max-steps", "8",
    "--save-steps", "3", "--per-device-train-batch-size", "4",
)  # fmt: skip


def train(together: Together, out: Path, *more: str, **job: Any) -> list[int]:
    words = ["train", *COMMAND, *more, "--out", str(out / "run")]
    return together.codes(out, processes=2, kind="command", words=words, **job)


def saved(out: Path) -> dict[str, Tensor]:
    return load_file(out / "run" / "adapter" / "adapter_model.safetensors")


def test_two_processes_in_one_run_directory(together: Together, tmp_path: Path) -> None:
    """One writes and tells. Killed and resumed it ends with the same adapter, dropout on; sharded, with the same."""
    assert train(together, tmp_path / "whole") == [0, 0], said(tmp_path / "whole")
    record = Record.read(tmp_path / "whole" / "run" / "record.json")
    assert (record.status, record.max_steps, len(record.kept)) == ("ok", 8, 3)
    told = [(tmp_path / "whole" / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert "adapters kept: 3 of 12" in told[0]
    assert "docstrings" not in told[1]

    killed = tmp_path / "killed"
    codes = train(together, killed, dies=7)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 2)
    resumed = together.codes(killed, processes=2, kind="command", words=["resume", str(killed / "run")])
    assert resumed == [0, 0], said(killed)
    assert max_difference(saved(killed), saved(tmp_path / "whole")) == 0.0

    assert train(together, tmp_path / "sharded", "--fsdp", "full_shard") == [0, 0], said(tmp_path / "sharded")
    assert max_difference(saved(tmp_path / "sharded"), saved(tmp_path / "whole")) == 0.0


def test_a_length_in_epochs_stays_what_it_was(together: Together, tmp_path: Path) -> None:
    """Two processes would count half as many steps for the same rows, too few for this warm-up."""
    words = list(COMMAND)
    words[words.index("--max-steps") : words.index("--max-steps") + 2] = ["--num-train-epochs", "1"]
    words[words.index("--per-device-train-batch-size") + 1] = "8"
    for name, more in (("whole", {}), ("killed", {"dies": 7})):
        out = tmp_path / name
        train = ["train", *words, "--dropout", "0", "--out", str(out / "run")]
        codes = together.codes(out, processes=1, kind="command", words=train, **more)
        assert codes == [-signal.SIGKILL if more else 0], said(out)
    resume = ["resume", str(tmp_path / "killed" / "run")]
    assert together.codes(tmp_path / "killed", processes=2, kind="command", words=resume) == [0, 0]
    assert Record.read(tmp_path / "killed" / "run" / "record.json").max_steps == 8
    # The model's own dropout draws other numbers from there on; what was decided before stays.
    chosen = [Selection.load(tmp_path / name / "run" / "selection.json").names for name in ("whole", "killed")]
    assert chosen[0] == chosen[1]


def test_a_command_that_shares_no_work(together: Together, tmp_path: Path) -> None:
    words = ["compare", *COMMAND, "--out", str(tmp_path / "out")]
    assert together.codes(tmp_path, processes=2, kind="command", words=words) == [2, 2]
    assert "2 processes were started, but only train and resume can use several" in said(tmp_path)
    assert not (tmp_path / "out").exists()


# `--cpu` starts several processes only by MPI; this asks for torchrun's way, and stays on the CPU where no GPU is.
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip


@pytest.mark.long
def test_the_launchers_themselves(tmp_path: Path) -> None:
    """Nothing forked: as a user starts it.

    Accelerate's launcher hands over to ``torch.distributed.run``, which is torchrun: one start goes through both.
    """
    run = tmp_path / "run"
    task = ["--task", "files", "--train-file", str(labelled(tmp_path / "rows.jsonl")), "--label-column", "label"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *ACCELERATE, "-m", "weightlora", "train", *COMMAND, *task, "--out", str(run)],
        capture_output=True, text=True, check=False, timeout=280,
        # Dynamo would load a compiler, for the functions of bitsandbytes.
        env={
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapters kept: 3 of 12") == 1
    assert Record.read(run / "record.json").status == "ok"
    assert (run / "checkpoints" / "checkpoint-8" / "rng_state_1.pth").is_file()  # there were two

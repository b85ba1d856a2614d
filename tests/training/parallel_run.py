"""Fits by several processes at once, each writing what it ended with; a script, to be started with one thread.

Importing the libraries takes seconds and a fork nothing: standard input has one job as JSON per line, and for each job
as many processes are forked off as it asks for, with the environment that torchrun would give them. When one of them
dies the others are killed, as torchrun does. Standard output: one answer per line, the processes' exit codes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig, get_peft_model
from tests.builders import QKV, adapter_state, base, batch, lora, trainer
from tests.methods.test_methods_battery import LORA, build
from tests.once import collect_seldom, remember
from tests.runs.killed_run import REHEARSAL
from tests.training.test_training_quantised import quantised
from tests.training.test_training_trl import GROWN, bare, dpo
from tests.training.test_training_trl import lora as dpo_lora
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import weightlora.report
import weightlora.runs.run
import weightlora.tasks  # noqa: F401  # what commands import in time, once for all
from weightlora.cli.main import main
from weightlora.errors import WeightLoRAError
from weightlora.graft.adapters import is_sharded
from weightlora.graft.selection import Selection
from weightlora.methods import (
    AdapterMethod,
    DoRA,
    Flexora,
    FullFineTuning,
    HeadOnly,
    Method,
    MiLoRA,
    PeftMethod,
    VBLoRA,
    VeRA,
    WeightLoRA,
    WeightLoRAPlus,
)
from weightlora.training import attach, fit

METHODS: dict[str, Method] = {
    "weightlora+": WeightLoRAPlus.from_preset("paper", k=2, select_after=5),
    "three": WeightLoRAPlus.from_preset("paper", k=3, select_after=5),
    "memory": WeightLoRA(memory="1GiB", select_after=5),
    "milora": MiLoRA(),
    "flexora": Flexora(select_after=5, batches=2),  # it looks at rows that no process trains on
    **{f"any {name}": build(name, "recommended") for name in LORA},
    **{f"any {kind.name}": kind() for kind in (FullFineTuning, HeadOnly, DoRA)},
    # Rounding grows with the rate, and theirs would be a hundred times the others'.
    **{f"any {kind.name}": kind(adapter_rate=1.0) for kind in (VeRA, VBLoRA)},
}
SHAPES = [(16, 16)] * 6  # of what adapters sit on
GRACE = 20.0  # seconds that processes may outlive one that failed: they wait for it in vain


def die_in_step(number: int) -> None:
    """Kill this process when its optimizer steps for the `number`-th time; checkpoints of earlier steps are written."""
    done = [0]

    def stepped(*_: Any) -> None:
        done[0] += 1
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(stepped)


def built(method: Method) -> nn.Module:
    """What a method trains, without dropout."""
    plain, config = base("bert", dropout=0.0), LoraConfig(r=4, target_modules=list(QKV["bert"]), task_type="SEQ_CLS")
    if not isinstance(method, PeftMethod):
        return plain
    return (
        lora(dropout=0.0)
        if isinstance(method, AdapterMethod)
        else get_peft_model(plain, method.peft_config(config, SHAPES))
    )


def on_quantised(kind: str, out: Path) -> nn.Module:
    """LoRA on a base that bitsandbytes has quantised."""
    base("llama", width=64, dropout=0.0).save_pretrained(out / f"base-{os.environ.get('RANK', '0')}")
    loaded = quantised(out / f"base-{os.environ.get('RANK', '0')}", kind)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS")
    torch.manual_seed(1)
    return get_peft_model(loaded, config)


def run(job: dict[str, Any]) -> None:
    """One process's part of a fit."""
    method, out = METHODS[job["method"]], Path(job["out"])
    model = on_quantised(job["base"], out) if "base" in job else built(method)
    # A batch of 4 rows, or two, are held out by a method that asks for some: 32 are left, which all ways of splitting
    # share evenly.
    count = 32 + 4 * min(2, method.needs.held_out)
    settings = {"save_strategy": "steps", "save_steps": 4, "per_device_eval_batch_size": 4, **job.get("arguments", {})}
    made = trainer(out / "run", model, count=count, **settings)
    rank = made.args.process_index
    result = fit(made, method, resume=job.get("resume", False), measure=False)
    sharded = [is_sharded(p) for p in made.model.parameters() if not p.requires_grad]
    seen = {"processes": made.args.world_size, "step": made.state.global_step, "sharded": all(sharded) and len(sharded)}
    (out / f"seen-{rank}.json").write_text(json.dumps(seen))
    torch.save(adapter_state(made.model) or made.model.state_dict(), out / f"adapter-{rank}.pt")
    if result.selection is not None:
        (out / f"selection-{rank}.json").write_text(result.selection.to_json())


class Collectives(TorchDispatchMode):
    """Notes every collective that this process starts, DDP's own among them: its name and how many numbers it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            moved = args[0] if isinstance(args[0], list) else [args[0]]
            self.seen.append((func.__name__.partition(".")[0], sum(t.numel() for t in moved if torch.is_tensor(t))))
        return func(*args, **(kwargs or {}))


def counted(job: dict[str, Any]) -> None:
    """A fit whose collectives are noted, each optimizer step between two of them."""
    with Collectives() as noted:
        register_optimizer_step_post_hook(lambda *_: noted.seen.append(("step", 0)))
        run(job)
    (Path(job["out"]) / f"collectives-{torch.distributed.get_rank()}.json").write_text(json.dumps(noted.seen))


def dpo_fit(job: dict[str, Any]) -> None:
    """TRL's DPO trainer, half a batch on each of two."""
    out = Path(job["out"])
    made = dpo(out / "run", bare(LlamaForCausalLM), peft_config=dpo_lora("CAUSAL_LM"), arguments=job["arguments"])
    selection = fit(made, GROWN, measure=False).selection
    assert selection is not None
    (out / f"selection-{made.args.process_index}.json").write_text(selection.to_json())
    torch.save(adapter_state(made.model), out / f"adapter-{made.args.process_index}.pt")


def loop(job: dict[str, Any]) -> None:
    """A loop of one's own with DDP; `wrapped`: how often the model is wrapped (the seam asks for a second time)."""
    together = job["processes"]
    if together > 1:
        torch.distributed.init_process_group("gloo")
    rank, out, model = int(os.environ.get("RANK", "0")), Path(job["out"]), lora(dropout=0.0)

    def wrap(**settings: Any) -> nn.Module:
        return DistributedDataParallel(model, **settings) if together > 1 else model

    # Wrapped once only, DDP is told that parameters may go unused: it would else notice the dropped ones itself.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = attach(model, WeightLoRAPlus.from_preset("paper", k=2, select_after=3), optimizer)
    wrapped = wrap(find_unused_parameters=job["wrapped"] == 1)
    for step in range(8):
        rows = {key: value.chunk(together)[rank] for key, value in batch(8, step).items()}
        wrapped(**rows).loss.backward()
        optimizer.step()
        if isinstance(tuner.step(), Selection) and job["wrapped"] == 2:
            wrapped = wrap()
        optimizer.zero_grad()
    (out / f"selection-{rank}.json").write_text(tuner.finish().to_json())
    torch.save(adapter_state(model), out / f"adapter-{rank}.pt")


def command(job: dict[str, Any]) -> None:
    """A command as the program runs it, and as torchrun would start it in each process."""
    sys.argv = ["weightlora", *job["words"]]
    code = main()
    if code:
        sys.stdout.flush()
        os._exit(code)


KINDS = {"run": run, "counted": counted, "loop": loop, "command": command, "dpo": dpo_fit}


def child(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    log = os.open(Path(job["out"]) / f"output-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["processes"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]), "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(job["processes"]), "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
    os.environ |= job.get("environment", {})
    if "dies" in job and rank == job["processes"] - 1:
        die_in_step(job["dies"])
    code = 1
    try:
        KINDS[job.get("kind", "run")](job)
        code = 0
    except WeightLoRAError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        code = 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(job: dict[str, Any]) -> list[int]:
    """Exit codes of a job's processes; -N: killed by signal N."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    living = {}
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        living[pid] = rank
    codes, deadline = [0] * job["processes"], float("inf")
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[living.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            for other in living:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return codes


def rehearse() -> None:
    """A fit and a command in this process: its children then have what libraries load and work out in passing."""
    remember()
    with tempfile.TemporaryDirectory() as folder:
        run({"out": folder, "method": "weightlora+"})
        assert main(["train", *REHEARSAL, "--out", str(Path(folder) / "command")]) == 0
    logging.getLogger().handlers.clear()  # each child says what it has to say where its own standard error is


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    rehearse()
    collect_seldom()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()

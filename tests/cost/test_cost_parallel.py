"""What several devices move: the model of the collectives beside FSDP2's own, on a process group that moves nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from weightlora.cost import PlanConfig, Planner
from weightlora.cost.parallel import Moved, Parallel, beside, traffic
from weightlora.cost.plan_text import plan_text
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters
from weightlora.graft.surgery import disconnect
from weightlora.runs.plan import adapted, calibrate, planner_for

N = 4
# Four labels: N divides the rows of every tensor that trains, so no gradient is padded.
CONFIG = PlanConfig(
    model="llama-small-shape", num_labels=4, length=16, batch=4, device="cpu", k=3, dropout=0.0, gated=False,
    devices=N, sharding="fsdp",
)  # fmt: skip


@functools.cache
def planner(config: PlanConfig = CONFIG) -> Planner:
    return planner_for(config)


@pytest.fixture
def devices() -> Iterator[None]:
    """A process group of N of which only this process exists; what is sent goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=N)
    yield
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Bytes that each gather hands out and each scatter takes in, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers: list[int] = []
        self.scatters: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.gathers.append(args[0].nbytes)
        elif name == "c10d::_reduce_scatter_base_":
            self.scatters.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("live", ["all", "deepest", "lowest of the upper half"])
def test_fsdp_moves_what_the_model_says(live: str, devices: None) -> None:
    plans = planner()
    blocks = plans.trace.blocks
    chosen = {
        "all": tuple(range(plans.n)),
        "deepest": plans.trace.deepest(3),
        "lowest of the upper half": (blocks.index(max(blocks) // 2 + 1),),
    }[live]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bones, model = adapted(CONFIG, "cpu")
    names = [a.name for a in adapters(model)]
    disconnect(model, [name for index, name in enumerate(names) if index not in chosen])
    mesh = init_device_mesh("cpu", (N,))
    for layer in bones.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Collectives() as seen:
        model(**bones.batch(1, 16)).loss.backward()
    phase = plans.final(chosen)
    said = traffic(Parallel(devices=N, sharding="fsdp"), plans.estimate.moved(phase), accumulation=1)
    assert len(seen.gathers) == said.gathers
    assert len(seen.scatters) == said.reductions
    # The embedding's rows are padded to a multiple of N.
    assert said.gathered == pytest.approx(sum(seen.gathers) * (N - 1) / N, rel=1e-4)
    assert said.reduced == sum(seen.scatters) * (N - 1) // N


sizes = st.integers(0, 10**6)


@given(
    blocks=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=6),
    outside=sizes,
    rest=sizes,
    devices=st.integers(2, 1024),
    accumulation=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_what_holds_for_every_model(
    blocks: list[tuple[int, int]], outside: int, rest: int, devices: int, accumulation: int
) -> None:
    moved = Moved(blocks=[w for w, _ in blocks], outside=outside, lowest=0, gradients=[g for _, g in blocks], rest=rest)
    last = replace(moved, lowest=len(blocks) - 1)
    for sharding in ("ddp", "fsdp", "zero3"):
        of = Parallel(devices=devices, sharding=sharding)
        one, deep = traffic(of, moved, accumulation), traffic(of, last, accumulation)
        assert deep.total <= one.total  # the seam never costs more
        assert one.reduced <= 2 * (sum(moved.gradients) + rest)
        assert one.gathered <= 2 * accumulation * (sum(moved.blocks) + outside)
        assert beside(of, moved) >= 0
    assert traffic(Parallel(devices=1, sharding="zero3"), moved, accumulation).total == 0
    assert beside(Parallel(), moved) == 0


def test_a_sharded_plan_holds_an_nth_and_says_what_is_modelled() -> None:
    alone, shared = planner(replace(CONFIG, devices=1)), planner()
    one, part = alone.plan(), shared.plan()
    assert one.warmup.traffic.total == 0
    assert part.warmup.traffic.gathered > part.final.traffic.gathered > 0
    for phase in ("warmup", "final"):
        before, after = getattr(one, phase).parts, getattr(part, phase).parts
        for name in ("adapters", "heads", "gradients", "optimizer"):
            assert getattr(after, name) == -(-getattr(before, name) // N)
        assert after.weights < before.weights / 2
        assert after.parallel > before.parallel == 0
    text = plan_text(part)
    assert "4 devices, fsdp; all figures per device" in text
    assert "sent per step (model)" in text
    assert "devices" not in plan_text(one)
    assert '"traffic"' in part.to_json()


def test_data_parallel_training_moves_gradients_alone() -> None:
    plan = planner(replace(CONFIG, sharding="ddp")).plan()
    for phase in (plan.warmup, plan.final):
        assert phase.traffic.gathered == 0
        assert phase.traffic.reduced == round(2 * (N - 1) / N * phase.parts.gradients)
    assert plan.final.traffic.reduced < plan.warmup.traffic.reduced


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="devices"):
        PlanConfig(devices=0)
    with pytest.raises(ConfigError, match="ddp"):
        PlanConfig(sharding="zero2")
    with pytest.raises(ConfigError, match="--probe runs on one device, and the plan is for 4"):
        calibrate(CONFIG, planner(), "cpu")

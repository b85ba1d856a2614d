"""Runs on a Ray cluster. What crosses is text: a configuration and a folder there, a record back."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from weightlora.errors import ConfigError

ANSWERS = 10.0  # seconds within which a cluster must answer
RETRIES = 3  # lives that a run has left after its worker has died under it; each goes on from the last checkpoint


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster and what one run takes of it. The run directories must lie where every node sees them.

    Args:
        address: "auto" (the cluster this machine belongs to), "local" (a Ray of its own on this machine, which ends
            with the command), ``host:port`` or ``ray://host:port``.
        cpus: of one run.
        gpus: of one run, also a part of one; None: one where the cluster has any.

    Raises:
        ConfigError: a value that is not allowed.
    """

    address: str
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if not self.address:
            raise ConfigError("the address of the Ray cluster is empty; use auto, local, or host:port")
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value is not None and not 0 <= value < 1000:
                raise ConfigError(f"ray_{name}={value} is not allowed; use the number for one run, such as 1")


def spread(
    jobs: Sequence[tuple[str, str]], cluster: Cluster, work: Callable[[str, str, str], str]
) -> Generator[tuple[int, str | None, str], None, None]:
    """Run jobs at once, and give back ``(index, what the work returned or None, error)`` as they end.

    A job whose worker dies is started again elsewhere; the work must go on by itself where it was.

    Args:
        jobs: a run's description as JSON, and its folder.
        cluster: where.
        work: called in a worker with a job and the directory that relative paths are from.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at this address.
    """
    if not jobs:
        return
    ray = _import_ray()
    own = not ray.is_initialized()
    if own:
        _connect(ray, cluster.address)
    try:
        gpus = cluster.gpus if cluster.gpus is not None else min(1, ray.cluster_resources().get("GPU", 0))
        run = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_retries=RETRIES)(work)
        here = str(Path.cwd())
        waiting = {run.remote(config, folder, here): index for index, (config, folder) in enumerate(jobs)}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            index = waiting.pop(reference)
            try:
                yield index, ray.get(reference), ""
            except ray.exceptions.RayError as error:
                yield index, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        if own:
            ray.shutdown()


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed; run: pip install 'weightlora[ray]', or leave --ray out") from None
    return ray


def _check_answers(ray: ModuleType, address: str) -> None:
    """Raise OSError where nobody answers: Ray itself would wait for minutes, also for a cluster that is gone."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto" and left.is_file() and not ray._private.services.find_gcs_addresses():
        address = left.read_text(encoding="utf-8").strip()  # where `auto` looks if no cluster's head runs here
    host, colon, port = address.rpartition(":")
    if not colon or "//" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS).close()
    except OSError as error:
        raise OSError(f"nobody answers at {address}: {error}") from None


def _connect(ray: ModuleType, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's coming behaviour: a task without GPUs leaves CUDA_VISIBLE_DEVICES alone. Said now, it does not warn.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {} if address != "local" else {"include_dashboard": False}
    try:
        _check_answers(ray, address)
        ray.init(address=address, log_to_driver=False, logging_level="WARNING", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no Ray cluster at {address!r} ({reason}); start one with `ray start --head`, or use --ray local"
        ) from None

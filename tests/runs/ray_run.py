"""Run commands on a Ray of two nodes with a worker each, in a process of its own: Ray's processes belong to it.

Arguments: a JSON list of commands, each a list of words, and a file for the process id of the second node's raylet.
Exit code: that of the first command that fails, else 0.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path


def entry() -> None:
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else it writes one to the home folder
    own |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    own |= {"TORCHDYNAMO_DISABLE": "1"}  # else workers load a compiler, for the functions of bitsandbytes
    os.environ |= own | {"RAY_worker_niceness": "0"}  # Ray's 15 would starve beside other tests
    sys.exit(on_two_nodes(json.loads(sys.argv[1]), Path(sys.argv[2])))


def on_two_nodes(commands: list[list[str]], raylet: Path) -> int:
    import ray
    from ray.cluster_utils import Cluster

    from weightlora.cli.main import main as weightlora

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    raylet.write_text(str(second.all_processes["raylet"][0].process.pid), encoding="utf-8")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        for words in commands:
            if code := weightlora(words):
                return code
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0

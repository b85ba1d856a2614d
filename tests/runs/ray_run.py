"""Run commands on a Ray of two nodes with a worker each; a script: Ray's processes belong to the one that starts them.

Arguments: a JSON list of commands, each a list of words, and a file for the process id of the second node's raylet.
Exit code: that of the first command that fails, else 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    import ray
    from ray.cluster_utils import Cluster

    from weightlora.cli.main import main as weightlora

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    Path(sys.argv[2]).write_text(str(second.all_processes["raylet"][0].process.pid), encoding="utf-8")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        for words in json.loads(sys.argv[1]):
            if code := weightlora(words):
                return code
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

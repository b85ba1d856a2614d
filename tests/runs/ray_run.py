"""Run commands on a Ray with two workers; a script, because Ray's processes belong to the one that starts them.

Arguments: a JSON list of commands, each a list of words. Exit code: that of the first command that fails, else 0.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    import ray

    from weightlora.cli.main import main as weightlora

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for words in json.loads(sys.argv[1]):
            if code := weightlora(words):
                return code
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

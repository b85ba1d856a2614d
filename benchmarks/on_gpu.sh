#!/usr/bin/env bash
# One visit to a machine with a CUDA device: on_gpu.py, over what `make carry` prepared where that was carried along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
CARRIED=${CARRIED:-build/carry}
if [ -d "$CARRIED/1" ] && [ ! -d "$CARRIED/site" ]; then
	"$PYTHON" benchmarks/carry.py unpack "$CARRIED"
fi
PYTHONPATH="$PWD/src:$PWD/$CARRIED/site${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" benchmarks/on_gpu.py "$@"

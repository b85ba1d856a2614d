#!/usr/bin/env bash
# Everything about the adapter path and the planner that needs a CUDA device of 80 GB; about 40 minutes. Results: benchmarks/results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}

# The kernels against the formula, and no waiting for the host, before anything is timed.
"$PYTHON" -m pytest -q tests/ops/test_ops_cuda.py

llama() { "$PYTHON" benchmarks/adapter_path.py --shape llama-3-8b --device cuda --seconds 120 "$@"; }
out=benchmarks/results/adapter-path-llama-3-8b-cuda
# Step time at most 1.08 of bare's, at least 1.25 times stock's tokens a second; K = 100 random and 56 deepest.
llama --dropout 0 --out "$out-dropout0.json"
llama --dropout 0.05 --out "$out-dropout0.05.json"
# Adapters in the base's dtype, and the engine without kernels of its own.
llama --dropout 0 --adapter-dtype base --out "$out-dropout0-bf16-adapters.json"
llama --dropout 0.05 --engine autograd --out "$out-dropout0.05-autograd.json"
# The dense update of all 224 adapters need not fit; of eight layers it does. At least 2 times as fast as that.
llama --layers 8 --dropout 0 --out "$out-8-layers.json"

# Figure 3 of the paper: DeBERTaV3-base, batch 64.
"$PYTHON" benchmarks/adapter_path.py --shape deberta-v3-base --device cuda --batch 64 --dropout 0.05 --seconds 60
"$PYTHON" benchmarks/memory_vs_adapters.py --device cuda --batch 64 --length 256

# The planner's totals beside the allocator's peak; one probe.
"$PYTHON" benchmarks/plan_accuracy.py --device cuda --shape minilm deberta-v3-base bart-large llama-3-8b
"$PYTHON" -m weightlora plan --model llama-3-8b --length 2048 --memory 80GB --probe

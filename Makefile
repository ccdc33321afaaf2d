# Commands for a new checkout: `make train`, `make test`. Each target first installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
PYTEST := -n 2 --dist loadgroup  # two processes; tests that share a training run in the same one

.DEFAULT_GOAL := help
.PHONY: help setup train test test-quick test-slow test-gpu test-slurm test-lowest lint format demo demo-segmentation pictures recipes reproduce benchmark benchmark-gpu clean

help:  ## List all targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(VENV)/.dev  ## Create .venv with all development dependencies (tests, linters, loggers, sweeps)

# Two stamp files, so that `make train` does not install the linters.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"vitrail needs Python 3.11 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=python3.x" if not (3, 11) <= v <= (3, 13) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
# One test loads an export in transformers. It is installed outside the environment, because torchmetrics imports it
# wherever it is found.
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --upgrade --target $(VENV)/transformers transformers tokenizers regex
	@touch $@

train: $(VENV)/.installed  ## Train a small ViT on the built-in digits (no download); options: make train ARGS="epochs=10"
	@$(BIN)/python src/train.py $(ARGS)

test: $(VENV)/.dev  ## Run the default test suite (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST) $(ARGS)

test-quick: $(VENV)/.dev  ## Run what catches most mistakes in under a minute: no programs, few large networks
	$(BIN)/python -m pytest $(PYTEST) -m 'not slow and not slurm and not gpu and not process and not thorough' $(ARGS)

test-slow: $(VENV)/.dev  ## Run the whole test suite, including slow tests
	$(BIN)/python -m pytest $(PYTEST) -m 'not slurm and not gpu' $(ARGS)

test-gpu:  ## Run the tests that need a GPU, in the current Python environment (8 minutes at most)
	VITRAIL_TEST_DEVICE=cuda $(PYTHON) -m pytest -m 'not slow' tests/test_gpu.py tests/test_on_device.py \
		tests/data/render/test_device.py $(ARGS)

test-slurm: $(VENV)/.dev  ## Test on a local SLURM (root; slurmctld slurmd slurmdbd slurm-client munge mariadb-server)
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py $(ARGS)

test-lowest:  ## Run the test suite with the lowest versions that pyproject.toml allows, in .venv-lowest
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	sed -nE 's/^ *"([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --disable-pip-version-check -q -c .venv-lowest/constraints.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest $(PYTEST) $(ARGS)

lint: $(VENV)/.dev  ## Check format, style, types and imports between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code and sort its imports
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

demo: $(VENV)/.dev  ## Measure whether token labels help, on real images, offline (15 minutes on 2 cores)
	$(BIN)/python benchmarks/demo.py $(ARGS)

demo-segmentation: $(VENV)/.dev  ## Measure whether they help segmentation too, with the runs of `make demo`
	$(BIN)/python benchmarks/demo_segmentation.py $(ARGS)

pictures: $(VENV)/.dev  ## Make every picture for README and docs (half an hour on 2 cores after `make demo`; needs chromium)
	$(BIN)/python benchmarks/pictures.py $(ARGS)

recipes: $(VENV)/.dev  ## Generate docs/recipes.md from conf/experiment/ and results/results.csv
	$(BIN)/python benchmarks/recipes.py

reproduce: $(VENV)/.installed  ## Repeat a finished run and compare its metrics: make reproduce run=logs/train/runs/...
	@$(BIN)/python src/train.py reproduce=$(run) $(ARGS)

benchmark: $(VENV)/.dev  ## Measure the overhead of the framework over a bare PyTorch loop
	$(BIN)/python benchmarks/overhead.py $(ARGS)

benchmark-gpu:  ## Measure training on a GPU in the current Python environment; adds rows to results/gpu.csv (8 minutes)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(ARGS)

clean:  ## Remove environments and caches (logs/ and data/ are kept)
	rm -rf .venv .venv-lowest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

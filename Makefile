# Everything a fresh machine needs: `make train`, `make test`. Each target sets up what it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
PYTEST := -n 2 --dist loadgroup  # two processes; tests that share a training stay together

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-slurm test-lowest lint format demo recipes reproduce benchmark clean

help:  ## Show every target with one line
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.dev  ## Create .venv with everything a developer needs (tests, linters, all loggers, sweeps)

# Two stamps, so that a user who only trains does not wait for the linters.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"vitrail needs Python 3.11 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=python3.x" if not (3, 11) <= v <= (3, 13) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

train: $(VENV)/.installed  ## Train a small ViT on the embedded digits (no network); more: make train ARGS="epochs=10"
	@$(BIN)/python src/train.py $(ARGS)

test: $(VENV)/.dev  ## Run the whole test suite (8 to 10 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST) $(ARGS)

test-slow: $(VENV)/.dev  ## Run the tests that take longer, too
	$(BIN)/python -m pytest $(PYTEST) -m 'not slurm' $(ARGS)

test-slurm: $(VENV)/.dev  ## Start a SLURM here and test on it (root; slurmctld slurmd slurmdbd slurm-client munge mariadb-server)
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py $(ARGS)

test-lowest:  ## Run the suite with the lowest versions that pyproject.toml allows, in .venv-lowest
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	sed -nE 's/^ *"([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --disable-pip-version-check -q -c .venv-lowest/constraints.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest $(PYTEST) $(ARGS)

lint: $(VENV)/.dev  ## Check format, style, types and the arrows between the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code and sort its imports
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

demo: $(VENV)/.dev  ## Show whether token labels help, on real pictures, offline (13 minutes on 2 cores)
	$(BIN)/python benchmarks/demo.py $(ARGS)

recipes: $(VENV)/.dev  ## Write docs/recipes.md from the heads of the experiments and from results/results.csv
	$(BIN)/python benchmarks/recipes.py

reproduce: $(VENV)/.installed  ## Repeat a finished run and compare its metrics: make reproduce run=logs/train/runs/...
	@$(BIN)/python src/train.py reproduce=$(run) $(ARGS)

benchmark: $(VENV)/.dev  ## Measure the cost of the framework against a bare PyTorch loop
	$(BIN)/python benchmarks/overhead.py $(ARGS)

clean:  ## Remove the environments and caches (runs in logs/ and data/ stay)
	rm -rf .venv .venv-lowest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# flowbench: `make help` explains every target.
PYTHON ?= python3
EXP ?= starflow_vs_wcfm
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One intra-op thread: two threads on a busy two-core machine spin and run several times slower than one.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help

$(STAMP): pyproject.toml constraints.txt .ci/install.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/install.py
	@# On all cores, and without the packages' own tests; templates that are no Python are left.
	@$(BIN)/python -m compileall -q -j 0 -x '[/\\]tests?[/\\]' $(VENV)/lib >/dev/null || true
	@touch $@

# All cores; a module's tests stay together while there is work for every worker.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal

.PHONY: help setup bench fit test test-slow test-portable gpu lint format tensorboard clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  Benches: $(basename $(notdir $(wildcard experiments/*.yaml)))"

setup: $(STAMP) ## Create .venv and install flowbench with its development tools; does nothing twice

bench: $(STAMP) ## Run a bench and write its report: make bench EXP=starflow_vs_wcfm
	@env -u OMP_NUM_THREADS $(BIN)/flowbench bench -c experiments/$(EXP).yaml

fit: $(STAMP) ## Train one experiment: make fit EXP=digits/wcfm
	@$(BIN)/flowbench fit -c experiments/$(EXP).yaml

test: $(STAMP) ## Run the tests on all cores (the slow ones excepted)
	@$(PYTEST)

test-slow: $(STAMP) ## Run the slow tests too: several processes, whole benches, trained densities
	@$(PYTEST) -m "slow or not slow"

test-portable: $(STAMP) ## Run the numerical tests on other processors' instructions, without oneDNN, in random order
	@$(BIN)/python -m tests.portable

gpu: $(STAMP) ## Measure on one GPU what only a GPU shows: make gpu [REFERENCE=checkout of ml-tarflow]
	@env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.gpu --output docs/results/gpu.md $(if $(REFERENCE),--reference $(REFERENCE))

lint: $(STAMP) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tensorboard: $(STAMP) ## Compare runs in the browser
	@$(BIN)/tensorboard --logdir runs

clean: ## Remove runs and build leftovers; keeps .venv, data/ and the user's cache folder
	rm -rf runs data/cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +

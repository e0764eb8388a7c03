SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help env run test check format unit e2e lock clean

BIN := .venv/bin
PACKAGES := schema trainer serving tfx_pipeline
# Tests run in this many processes; 0 runs them in one, for a debugger. A process takes up to 4 GiB.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(TEST_WORKERS) --no-loadscope-reorder
PYTEST_ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## find a Python 3.10 and build .venv from requirements.lock, if it is not up to date
	@scripts/bootstrap.sh

run: env ## the whole job on the embedded data: pipeline, model server, recommendations, report
	@$(BIN)/funnel demo

test: check ## checks, then the whole test suite
	$(PYTEST) $(PYTEST_ARGS)

check: env ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

format: env ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: env ## the fast tests only
	$(PYTEST) -m "not e2e and not slow and not browser" $(PYTEST_ARGS)

e2e: env ## the tests that run whole pipelines
	$(PYTEST) -m e2e $(PYTEST_ARGS)

lock: ## resolve setup.py into requirements.lock; UPGRADE=1 also moves the packages that setup.py leaves free
	@scripts/lock.sh $(if $(UPGRADE),--upgrade)

clean: ## remove .venv, caches and build folders; runs are kept
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

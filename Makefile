# What can be done here? `make` lists it.
.DEFAULT_GOAL := help
PYTHON_IN := .venv/bin/python
# A worker per core, files in their order (tests/conftest.py).
TESTS := $(PYTHON_IN) -m pytest -n logical --maxprocesses=8 --no-loadscope-reorder

.PHONY: help setup smoke smoke-cifar test soak check format clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## system libraries, .venv and all packages; instant when nothing changed
	@bash .ci/setup.sh

smoke: setup  ## train, fine-tune and export a small sparse network on 2 ranks
	@bash .ci/smoke.sh

smoke-cifar: setup  ## train a 95 % sparse network on CIFAR, on one GPU in about a minute, on a CPU in under five
	@bash .ci/smoke_cifar.sh

test: setup  ## the test suite
	@$(TESTS)
	@$(PYTHON_IN) -m pytest -q tests/test_project_cuda.py

soak: setup  ## long runs: many kill seeds, long tables
	@$(PYTHON_IN) -m pytest -m soak

check: setup  ## format check, lint, types, tests: what a change must pass
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m mypy
	$(TESTS)
	$(PYTHON_IN) -m pytest -q tests/test_project_cuda.py

format: setup  ## rewrite the files in the project's format
	$(PYTHON_IN) -m ruff format .
	$(PYTHON_IN) -m ruff check --fix-only .

clean:  ## remove caches and build outputs (keeps .venv, data/ and runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

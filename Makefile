# make setup | test | test-long | slurm | matrix | demo | lint | docs | clean. Each does all that it needs and may be run again at once.

PYTHON ?= python3
# The default wheel on Linux is the CUDA build. Another one: make setup TORCH="torch==2.13.0 --index-url <index>"
TORCH ?= $(shell grep '^torch==' constraints.txt)

# Test files that run at once; each may start up to 8 ranks of one thread.
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
# Without torch, so that TORCH may name another version.
PINS := $(VENV)/constraints.txt
# Files that tests read, out of packages that nothing imports.
MATERIALS := $(VENV)/materials

# The tests start many processes; each would compile the package again.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: help setup test test-long slurm matrix lint demo docs clean

help:
	@echo 'make setup   create $(VENV) and install the pinned packages'
	@echo 'make demo    from raw text to a trained model, on any machine, in a few minutes'
	@echo 'make test    lint, types, and what no change may break'
	@echo 'make test-long  the other tests: kills, all pairs of layouts, planted bugs, guide, demo, Slurm'
	@echo 'make slurm   install Slurm from Debian or Ubuntu, for its tests (as root)'
	@echo 'make matrix  every legal layout of up to 8 ranks against one process, on CPU'
	@echo 'make lint    only lint and types'
	@echo 'make docs    write docs/configuration.md and the file table of docs/architecture.md again'
	@echo 'make clean   remove caches and build/; $(VENV) and runs/ stay'

setup: $(STAMP)

$(STAMP): setup.py constraints.txt tests/materials.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'megallama needs Python 3.10 or newer; $(PYTHON) is: '"$$($(PYTHON) --version 2>&1 | head -n 1)"'.' \
	    'Name another one: make setup PYTHON=python3.12' >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)' >&2; exit 2; }
	@grep -v '^torch==' constraints.txt > $(PINS)
	@echo 'installing packages into $(VENV): some minutes'
	@$(PIP) -c $(PINS) $(TORCH)
	@$(PIP) -c $(PINS) -e '.[dev]'
	@rm -rf $(MATERIALS)
	@$(PIP) --no-deps --target $(MATERIALS) -r tests/materials.txt
	@touch $@

test: lint
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m 'not long'

test-long: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m long

slurm:
	@for program in slurmctld slurmd sbatch munged; do \
	  command -v $$program > /dev/null || missing=yes; done; \
	test -z "$$missing" || { apt-get update && DEBIAN_FRONTEND=noninteractive \
	  apt-get install --yes --no-install-recommends munge slurm-client slurmctld slurmd; }

matrix: setup
	$(BIN)/python -m tests.layouts.matrix

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sh .ci/run

demo: setup
	$(BIN)/python launch/demo.py

docs: setup
	$(BIN)/python -m megallama.config.reference
	$(BIN)/python -m tests.project.file_table

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

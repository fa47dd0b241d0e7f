# The same words on a laptop and in CI. Every target sets up what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup check test demo-tiny bench clean
help:  ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(STAMP)  ## a .venv with pinned versions

# torch first and alone: any range that admits a newer release would bring several gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

check: $(STAMP)  ## ruff, pyright (strict on async_rl), layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n 0 tests/test_layering.py

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -q

demo-tiny: $(STAMP)  ## learn to sort four digits from random weights, in about a minute
	$(BIN)/async-rl train recipes/sort.toml --run-dir runs/demo-tiny

bench: bench-overlap bench-losses  ## every benchmark

bench-%: $(STAMP)  ## one benchmark: bench-overlap, bench-losses
	$(BIN)/python bench/$(subst -,_,$*).py

clean:  ## remove what the targets above made
	rm -rf $(VENV) .venv-peers runs build *.egg-info

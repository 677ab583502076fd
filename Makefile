# `make demo` shows the pipeline on a real trained network; `make test` runs every check. Each sets up all it needs in
# .venv, from nothing but a Python 3.11 (`make PYTHON=/path/to/python3.11 test` where it has another name).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := graphopt passes backends
SOURCES := $(PACKAGES) tests tools
OUT ?= out/demo
ARM64 ?= $(HOME)/.cache/graphopt/arm64

.PHONY: help setup demo test test-arm64 lint types check format clean FORCE

help:
	@echo 'make demo    optimise the digits network and print what that did'
	@echo 'make test    ruff, mypy --strict, pytest'
	@echo 'make test-arm64  run bundles for arm64 in an emulated system (900 MB in $(ARM64))'
	@echo 'make format  rewrite the sources in the house style'
	@echo 'make clean   remove what the other targets made'

setup: $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "graphopt needs Python 3.11 or newer; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A strict editable install is a tree of links to the files that existed when it was made, so that type checkers can
# follow graphopt.passes and graphopt.backends into their folders; it is made anew when a file comes or goes.
$(VENV)/files: $(BIN)/python FORCE
	@find $(PACKAGES) -type f -not -name '*.py[co]' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/installed: pyproject.toml tools/constraints.txt $(VENV)/files
	rm -rf build/__editable__.*
	$(BIN)/python -m pip install --quiet -c tools/constraints.txt --config-settings editable_mode=strict -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/graphopt optimize examples/digits/digits.onnx --passes 'fold,prune{macs=0.4},quantize' --target cpu \
	  --calib examples/digits/calib.npz --eval examples/digits/eval.npz --metric top1 -o $(OUT)

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# Run from the link tree's parent: from here mypy would find ./graphopt, which holds neither passes nor backends.
types: setup
	cd build && MYPYPATH=$$(echo __editable__.*) ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache

# One thread for linear algebra in each of the workers: two pools of threads on the same cores wait for each other.
check: setup
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# In this order whatever make's -j says, so that pytest's summary is the last line.
test: setup
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory check

# Once made, the system stays outside the repository; the models are the shared ones (GRAPHOPT_DATA).
test-arm64: setup
	PIP="$(abspath $(BIN))/python -m pip" tools/arm64/prepare.sh $(ARM64)
	GRAPHOPT_ARM64=$(ARM64) $(BIN)/pytest -n $(WORKERS) tests/arm64

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

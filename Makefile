# Every target sets up what it needs in .venv, from the pinned versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := "$(VENV)"/bin
# PyTorch keeps its CPU builds on an index of its own; the default index's torch brings gigabytes of CUDA.
# Used where it can be reached; otherwise pip takes the pinned torch from wherever it is configured to look.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BUSY ?= 0
# Processes that run tests.
JOBS ?= 2

.PHONY: help setup setup-demo test soak lint demo bench bench-replay bench-aa bench-agree bench-heldout bench-cpu bench-dispatch bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

# The script knows what is up to date: make can't name a file in a folder with spaces.
SETUP = @PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/setup.sh

setup: ## install DKS and its tools into .venv
	$(SETUP) dev

setup-demo: ## the same, with the demo's model
	$(SETUP) dev,demo

test: setup ## run the tests (no GPU; some 15 minutes on 2 cores: it compiles and sanitizes kernels)
	$(BIN)/python -m pytest -q -n $(JOBS)

soak: setup ## the long forms of the tests: kills, mutated files, every kernel on a wide grid, swaps under load, GPU programs, models
	DKS_SOAK=1 $(BIN)/python -m pytest -q -s tests/profiler/test_kills.py tests/profiler/test_check.py \
	  tests/codegen/test_mutations.py tests/codegen/test_serving.py tests/tiles/test_sanitized.py tests/gpu \
	  tests/dispatch/test_architectures.py

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup-demo ## profile, generate and serve a real model; prints a table
	$(BIN)/python -m bench.demo

bench: setup ## every problem of the MiniLM sweep: default, chosen, oracle, on bins and between them
	$(BIN)/python -m bench.operators

bench-replay: setup ## what racing saves, replayed on a record of every candidate to the end
	$(BIN)/python -m bench.replay

bench-aa: setup ## false winners: the framework's kernel swept against copies of itself (BUSY=2: beside two processes)
	$(BIN)/python -m bench.trust aa --busy $(BUSY)

bench-agree: setup ## two sweeps of a hundred problems: do their choices agree? (BUSY=2: beside two processes)
	$(BIN)/python -m bench.trust agree --busy $(BUSY)

bench-heldout: setup ## regret on sizes that no choice was made from, every operator, at most 4 kernels each
	$(BIN)/python -m bench.heldout

bench-cpu: setup ## the generated CPU kernels against torch, oneDNN and the machine's own roofs, on one thread
	$(BIN)/python -m bench.cpu

bench-dispatch: setup ## what choosing and calling cost: compiled, in Python, in C++, and peers
	$(BIN)/python -m bench.dispatch

bench-gpu: setup ## the seven rows of the GPU table; needs the packages of scripts/gpu_campaign.sh
	@for name in gemm llama heldout launch rows attention views; do $(BIN)/python -m bench.gpu_$$name || exit; done

bench-gpu-%: setup ## one of them: gemm, llama, heldout, launch, rows, attention, views
	$(BIN)/python -m bench.gpu_$*

clean: ## remove the environment and all results
	rm -rf "$(VENV)" runs

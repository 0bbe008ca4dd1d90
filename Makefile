# Each target sets up what it needs: a fresh clone wants Python >= 3.11, git and make, and a second run installs nothing.
#   make demo ARGS="--seed 1"      make test PYTHON=python3.13      make gpu ARGS="head sweep"      make bench BENCH=sweep
#   make recipe NAME=sft-dpo       make learn ARGS="grpo ppo --seeds 3"
# PYTHON makes .venv; `make gpu` runs in it directly where it has torch with a GPU.

PYTHON ?= python3
ARGS ?=
BENCH ?= head families
NAME ?= sft-grpo
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two workers of one thread each: most tests are many small ops, which a second thread does not help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo recipe learn test test-all gpu lint bench readme clean

demo: .venv/.train
	$(BIN)/fastpost demo $(ARGS)

recipe: .venv/.train
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/run.sh $(NAME) $(ARGS)

# Every method on a tiny model, three seeds: minutes a run, and an error where one does not learn.
learn: .venv/.train
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/learn.py $(ARGS)

test: .venv/.dev
	$(BIN)/ruff check --quiet
	$(PYTEST) -m "not slow and not gpu" $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter $(ARGS)

test-all: test
	$(PYTEST) -m "slow and not gpu" $(ARGS)

# Where PYTHON already has torch and a GPU, that torch is the one to test, and there may be no network: nothing is
# installed into it but this package, in place.
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) -c 'import fastpost.kernels' 2>/dev/null \
			|| $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .; \
		$(PYTHON) tests/gpu.py $(ARGS); \
	else \
		$(MAKE) --no-print-directory .venv/.dev,gpu,bench && $(BIN)/python tests/gpu.py $(ARGS); \
	fi

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/.train,bench
	$(foreach name,$(BENCH),$(BIN)/python benchmarks/$(name).py $(ARGS) &&) true

# What the README takes from the code and from benchmarks/results: a sweep and row kernels have no table there.
MEASURED := $(filter-out %-sweep.jsonl %-rows.jsonl,$(sort $(wildcard benchmarks/results/*.jsonl)))
readme: .venv/.dev
	$(BIN)/python docs/losses_table.py
	$(BIN)/python benchmarks/tables.py $(MEASURED)
	$(BIN)/python benchmarks/end_to_end_table.py benchmarks/results/end_to_end/*.jsonl
	$(BIN)/python docs/memory_table.py
	$(BIN)/python benchmarks/learn_report.py benchmarks/results/learn/*.jsonl
	$(BIN)/python benchmarks/trainers_table.py benchmarks/results/trainers/*.jsonl

clean:
	rm -rf build dist *.egg-info fastpost/_native*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# .venv/.EXTRAS is the stamp of having installed fastpost[EXTRAS]. torch comes first and build isolation is off because
# the native extension is compiled against the torch that will load it; without a compiler it is left out.
.venv/.%: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "installing fastpost[$*] into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable ".[$*]"
	@$(BIN)/python -c 'import fastpost._native' 2>/dev/null \
		|| echo "the native extension is not built, for want of a C++ compiler (on x86-64, GCC 12 or newer)"
	@touch "$@"

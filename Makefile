# Two commands do all the set-up:  make train   and   make test.
#   ARGS="--help" make train      passes flags on
#   PYTHON=python3.12 make test   picks the interpreter of a new .venv (delete .venv to change it later)

PYTHON ?= python3
ARGS   ?=
SUITE  ?= speed.step
JOBS   ?= auto
STEPS  ?= 2000
FUZZ   ?= 10000

SHELL       := /bin/bash
VENV        := .venv
BIN         := $(VENV)/bin
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

# Pins the isolated build as well; newer pip reads the second name for that. Relative: pip splits the value at spaces.
export PIP_CONSTRAINT       := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where it is set, every process would compile torch, diffusers and transformers anew: a start takes three times as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help train test wheel fuzz soak lint bench bench-check real-size clean

help:
	@sed -n '1,3s/^# *//p' Makefile
	@echo "other targets: wheel, fuzz, soak (STEPS=$(STEPS)), lint, bench (SUITE=$(SUITE)), bench-check, real-size, clean"

train: $(VENV)/.installed-core
	$(BIN)/python -m bilevel_fast.train $(ARGS)

# One process a core with one thread each: most tests are too small to share. JOBS=0 runs them in this process.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not faults" -n $(JOBS) --dist worksteal $(ARGS)

# The sdist, the wheel that is built from it alone, and a run of that wheel where there is no checkout: two minutes.
wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	WHEEL=dist OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

# FUZZ damaged and hostile files per reader; `make test` tries 300. With FUZZ_ROWS=benchmarks/results/fuzz.jsonl each reader
# that stands them gets a row, of which docs/situations.md is made.
fuzz: $(VENV)/.installed-test
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o faulthandler_timeout=7200 tests/test_fuzz.py -n $(JOBS) $(ARGS)

# Every command that writes, ten folders each in which it is killed and has no room; then a long run that is killed again
# and again beside one that is not, which took 94 minutes of a machine that others used; less with STEPS=200.
soak: $(VENV)/.installed-test
	SOAK=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults tests/training/test_kill.py -n $(JOBS) $(ARGS)
	$(BIN)/python -m benchmarks.soak --steps $(STEPS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.$(SUITE) $(ARGS)

# Fails if MACs, launches, compiled kernels or the CPU step's ratio are worse than benchmarks/results/baseline.jsonl.
bench-check: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.pages.bench_check $(ARGS)

# Every command at the size of Stable Diffusion 2.1, on random weights: 40 minutes, 20 GiB of memory. Killed, it goes on.
real-size: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.real_size $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

# Editable, for the reason in CONTRIBUTING.md. Done again only when something that decides the result has changed. Python
# compiles the modules that are imported, instead of pip all of them.
$(VENV)/.installed-core: $(BUILD_FILES) | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile -e .
	@touch $@

$(VENV)/.installed-test: $(BUILD_FILES) | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile -e '.[test]'
	@touch $(VENV)/.installed-core $@

$(VENV)/.installed-dev: $(BUILD_FILES) | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile -e '.[dev]'
	@touch $(VENV)/.installed-core $(VENV)/.installed-test $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) not found; run: PYTHON=/path/to/python3.11 make $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) -V) is too old; run: PYTHON=python3.11 make $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# `make demo` and `make test` need only make and Python 3.11 or newer; the rest goes into $(VENV).
# PYTHON=python3.12 picks the interpreter, VENV=... another folder, PIP_ARGS=... adds options to every pip install.

VENV ?= .venv
PYTHON ?=
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
ZOO_ARGS ?= core
BENCH_ARGS ?= --device cpu
FUZZ_ARGS ?= --graphs 20000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: help demo test test-gpu zoo fuzz bench lint format venv clean

help:
	@echo 'make demo    the whole path on handwritten digits: expand, train, fold, export (writes ./gpd-demo)'
	@echo 'make test    the tests'
	@echo 'make test-gpu  the tests of the kernels, compiled for the CUDA device that is here'
	@echo 'make zoo     whole models in float64; ZOO_ARGS="all --no-step" takes 435; goes on where it stopped (zoo.jsonl)'
	@echo 'make fuzz    20,000 random models in float64; FUZZ_ARGS="--graphs 1000 --seed 3" takes others'
	@echo 'make bench   speed and memory, 8 minutes, into bench/results; BENCH_ARGS="--device cuda" on a GPU'
	@echo 'make lint    ruff and pyright'
	@echo 'make format  let ruff rewrite the code'
	@echo 'make venv    only the virtual environment with everything in it'
	@echo 'make clean   remove what these commands made'

demo: $(VENV)/.demo
	$(BIN)/gpd-fx demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(TEST_ARGS)

test-gpu: $(VENV)/.dev
	GPD_FX_DEVICE=cuda $(BIN)/python -m pytest tests/test_cuda.py $(TEST_ARGS)

zoo: $(VENV)/.dev
	$(BIN)/python -m bench.zoo $(ZOO_ARGS)

fuzz: $(VENV)/.dev
	$(BIN)/python -m bench.fuzz $(FUZZ_ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m bench all $(BENCH_ARGS)
	$(BIN)/python -m bench table

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.dev

# The first interpreter that runs, is new enough and can make a virtual environment.
$(VENV)/.created:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
	  if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) || exit 1; \
	    $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	      { echo 'error: $(VENV) holds a Python older than 3.11; remove it and run make again' >&2; exit 1; }; \
	    touch $@; exit 0; \
	  fi; \
	done; \
	echo 'error: no Python 3.11 or newer with the venv module was found$(if $(PYTHON), at PYTHON=$(PYTHON)).' >&2; \
	echo '       Install one (Debian and Ubuntu: python3 and python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; \
	exit 1

# Installed again only when pyproject.toml changed; dev contains demo.
$(VENV)/.demo: pyproject.toml | $(VENV)/.created
	@echo 'installing gpd_fx[demo] into $(VENV); the first time this downloads PyTorch'
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	@echo 'installing gpd_fx[dev] into $(VENV); the first time this downloads PyTorch'
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) build dist gpd_fx.egg-info gpd-demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# DriftRL's commands. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9
LOCK_VENV := .venv-lock

TRAIN ?= policyflow --env HalfCheetah-v5 --total-timesteps 200000
PYTEST_ARGS ?=
LOCK_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint format docs lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON (interpreter for .venv, 3.10 or newer), TRAIN (arguments of train.py), PYTEST_ARGS, LOCK_ARGS.'
	@echo 'pip obeys your own configuration: point it at a CPU-only build of PyTorch to leave out the CUDA libraries.'

setup: $(READY)  ## create .venv from requirements.lock, or bring it up to date
	@echo 'Ready: $(BIN)/python'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'DriftRL needs Python 3.10 or newer; $(PYTHON) is '"$$($(PYTHON) --version 2>&1)"'. Choose another: make PYTHON=python3.11 ...' >&2; exit 1; }
	@test -x $(BIN)/pip || { echo 'Setting up $(VENV): a minute or more, most of it PyTorch.'; $(PYTHON) -m venv $(VENV); } || { \
	  echo 'Could not create $(VENV). Debian and Ubuntu keep the venv module in a package of its own, python3-venv.' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

train: $(READY)  ## train and evaluate PolicyFlow on HalfCheetah-v5
	$(BIN)/python train.py $(TRAIN)

test: $(READY)  ## run the tests, without those marked slow
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-all: $(READY)  ## run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)  ## check lint rules, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# -W and -n: a link that leads nowhere, and a public name without documentation, are errors. -E: a warning of the last
# build would not come again.
docs: $(READY)  ## build the documentation site, build/site/index.html (Python 3.11 or newer)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'The site needs Python 3.11 or newer: make clean, then make PYTHON=python3.12 docs.' >&2; exit 1; }
	$(BIN)/python -m sphinx -E -q -n -W --keep-going -b html -d build/doctrees -c docs . build/site
	@echo 'Built: build/site/index.html'

# One resolution for all Pythons and platforms. The CUDA libraries are left out: pip finds those that belong to the
# PyTorch build it installs, which on a CPU-only build are none. That is also why there are no hashes.
lock:  ## resolve requirements.lock anew, keeping its versions (LOCK_ARGS=--upgrade to move them)
	test -x $(LOCK_VENV)/bin/uv || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	cp requirements.lock $(LOCK_VENV)/requirements.lock
	$(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.10 --fork-strategy fewest --extra dev \
	  --no-python-downloads --annotation-style line --custom-compile-command 'make lock' \
	  $(LOCK_ARGS) -o $(LOCK_VENV)/requirements.lock pyproject.toml
	grep -vE '^(nvidia-|cuda-|triton)' $(LOCK_VENV)/requirements.lock > requirements.lock

clean:  ## remove .venv, caches and builds; keeps runs/
	rm -rf $(VENV) $(LOCK_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

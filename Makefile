# What people and machines run. `make help` says what there is.
#
# Everything is installed into .venv, at the versions that constraints.txt pins; running a target again installs only
# what has changed since. Needs Python 3.11 or newer, make and pip.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The same examples in every run (tests/conftest.py): what `pytest` alone finds with new ones becomes a test of its own.
SAME := --hypothesis-profile=same
# One worker more than cores, since many tests wait; who runs out of tests takes some of another's. A worker that dies
# fails the run: pytest-xdist 3.8 may hand the next one what is done already (it did with `loadfile`), and wait for ever.
WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 7 ? cores + 1 : 8)))
SPREAD := --dist worksteal --max-worker-restart=0
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check format fuzz bench clean

help:  ## Say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

install: $(VENV)/.installed  ## Install Fallow and its tools into .venv

demo: $(VENV)/.installed  ## Three devices answer, one is killed, the answer goes on
	@$(BIN)/python -m fallow.demo

test: $(VENV)/.installed  ## Run every test; what is skipped is listed with its reason
	@$(BIN)/python -m pytest $(SAME) --ignore=tests/system -n $(WORKERS) $(SPREAD); first=$$?; \
	$(BIN)/python -m pytest $(SAME) tests/system && exit $$first

check: $(VENV)/.installed  ## Style, types and the rules about imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed  ## Bring the code into its style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

fuzz: $(VENV)/.installed  ## Ten minutes of broken input; findings are kept as tests
	@$(BIN)/python -m tests.fuzz --minutes 10

bench: $(VENV)/.bench  ## Measure against the bounds and llama.cpp; prints ratios
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Remove .venv and what tools leave behind
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist

# A venv without pip (Debian without python3-venv) gets pip from the one outside.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Fallow needs Python 3.11 or newer, and none was found. Install it, or say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	|| { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --quiet --python $(VENV)/bin/python install pip; } \
	|| { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) …"
	@$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@$(INSTALL) -e '.[dev,bench]'
	@touch $@

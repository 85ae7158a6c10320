# Every target makes its own .venv and installs what it needs.
#   make demo            a teacher, an SFT start and an OKD student in a few minutes
#   make test            the quick tests; PARITY=1 adds the comparisons with torch
#   make test-slow       the long ones
#   make faults          damages every file of a run, and kills runs at random moments:
#                        an hour and more on two cores
#   make mutants         plants known bugs and shows that the tests catch each
#   make fuzz            5,200 inputs that somebody else may have made, in minutes
#   make lint            ruff check and format
# PYTHON=… names the interpreter; by default python3 if it is 3.11 or newer, else the
# newest one on the PATH.

NEWEST := python3.14 python3.13 python3.12 python3.11
OK := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 $(NEWEST); do \
  if command -v $$p >/dev/null && $$p -c '$(OK)' 2>/dev/null; then echo $$p; break; fi; \
  done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
RUN ?= runs/quickstart
PARITY ?=

# glibc with huge pages: a third less time for small models on CPU (BUILD_NOTES.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow faults fuzz mutants lint clean

demo: $(VENV)/.run
	$(BIN)/python -m okd_jax.main --config=configs/quickstart.py --workdir=$(RUN)

test: $(VENV)/.test$(if $(PARITY),-parity)
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test$(if $(PARITY),-parity)
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/.test
	$(BIN)/python -m tests.faults.damage
	$(BIN)/python tests/faults/kills.py

mutants: $(VENV)/.test
	$(BIN)/python tests/mutate.py

fuzz: $(VENV)/.test
	cd tests && PYTHONPATH=.:.. ../$(BIN)/python -m fuzz.run $(if $(SEED),--seed=$(SEED))

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; set PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages; a newer pyproject.toml installs again.
$(VENV)/.run: $(BIN)/python pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.test-parity: $(BIN)/python pyproject.toml
	$(PIP) -e '.[test,parity]'
	@touch $@ $(VENV)/.test $(VENV)/.run

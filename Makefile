# make train   installs into .venv, prepares the flights data, trains on local Ray, draws the loss curve
# make test    every check that needs no root: ruff, mypy, pytest
# make test-cluster   ray up, ray submit, lost machines: in namespaces of its own, which takes root, sshd and rsync
# make lint    the static ones of them
# make soak    100,000 hostile schedules of the protocol over all cores: `make soak SOAK_ARGS='--count 5000 --first 7'`
# make bench   measures against peers, in about a quarter of an hour: `make bench BENCH_ARGS='step --rounds 5'`
# make clean   removes what the others made, but no run: runs/ stays

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
RUN := runs/flights

.DELETE_ON_ERROR:
.PHONY: train test test-cluster lint soak bench clean

train: $(VENV)/.train-installed
	$(BIN)/python jobs/flights.py
	$(BIN)/raysgd train jobs/flights.toml
	@echo
	@echo "run:     $(RUN)"
	@echo "picture: $(RUN)/loss.png"
	@echo "next:    $(BIN)/raysgd inspect $(RUN)"

test: lint
	$(BIN)/python -m pytest --ignore=tests/cluster $(PYTEST_ARGS)

# Where there is no root, no sshd or no namespaces, its tests are skipped and say so.
test-cluster: $(VENV)/.dev-installed
	$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A schedule that is wrong is printed with the command that replays it.
soak: $(VENV)/.train-installed
	$(BIN)/python tests/soak.py $(SOAK_ARGS)

# BENCH_ARGS: see `python -m bench --help`. Open MPI comes from the system: apt-get install openmpi-bin
bench: $(VENV)/.bench-installed
	$(BIN)/python -m bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Editable: a change of the code needs no new install, a change of the dependencies does.
$(VENV)/.train-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[examples,plot]'
	@touch $@

# PyTorch comes first, alone: what else is asked for can then not choose another build of it.
$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.train-installed

$(VENV)/.bench-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[bench]'
	@touch $@

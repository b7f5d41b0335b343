# make demo   plans on a synthetic multi-camera world and reports what pruning costs and saves
# make test   runs the tests
# make lint   ruff, mypy and the import rules
# Both set up .venv on first use. Variables: PYTHON, VENV, TORCH (a torch requirement or wheel), OUT, JOBS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out/demo
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-quick test-vehicle lint setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

# setuptools warns of every editable installation, whatever is installed.
QUIET := PYTHONWARNINGS="ignore:Editable installation"

setup: $(READY)

# On other versions the pins of constraints.txt would fail later, in words of pip.
CHECK_PYTHON := import sys; v = sys.version_info[:2]; \
	sys.exit(None if v in ((3, 11), (3, 12)) else "error: $(PYTHON) is Python %d.%d; " % v + \
	"development needs 3.11 or 3.12: name one with PYTHON=python3.11")

# torch first: with one present, nothing below asks for another build of it.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[export,eval,ray,record,viz,profile,dev,ros-test]"
	@touch $@

demo: $(READY)
	$(BIN)/vla-autoprune demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) tests

# The vehicle subset on its oldest Python: no torch, no transformers.
VEHICLE_PYTHON ?= python3.10
VEHICLE_TESTS := test_bundle.py test_recipe.py models/test_preprocess.py runtime pruning profiling
test-vehicle:
	$(VEHICLE_PYTHON) -m venv $(VENV)-vehicle
	$(VENV)-vehicle/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vehicle/bin/python -m pip install --quiet -c constraints.txt ".[ros-test]" pytest pytest-timeout hypothesis
	$(VENV)-vehicle/bin/python -m pytest tests/engines tests/ros_nodes $(addprefix tests/vla_autoprune/,$(VEHICLE_TESTS))

test-quick: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# make demo: trains and evaluates TBPS-CLIP on generated pedestrians; works on a fresh machine.
# make test: runs all tests. make test-fast: only those that start no process and take about a second at most.
# make test-oldest: runs all tests on the oldest packages, in an environment of its own with Python 3.10.
# make lint: checks the style and the types.
# make bench: measures speed next to the published way of doing the same work; prints tables, writes benchmarks.json.
# make gpu: proves and measures everything on a GPU, in 9 minutes; prints tables, writes gpu.json. Without a GPU, a small
#           version runs on the CPU. With PYTHON=... it uses that interpreter as it is, and installs nothing.
# make soak: kills a training KILLS times (about ten seconds each), and compares it with an undisturbed training.

PYTHON ?= python3
BIN := .venv/bin
KILLS ?= 200

.PHONY: python demo test test-fast test-oldest bench gpu soak lint

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old, 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }

# Installs again when the requirements change.
.venv/installed: $(wildcard requirements*.txt) | python
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: python
	@$(PYTHON) -m misc.commands.demo $(PYTHON)

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The plugin tests/fast.py marks the tests that start a process.
test-fast: .venv/installed
	$(BIN)/python -m pytest -p tests.fast -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

# Python 3.10, because newer ones have no wheels of some of these packages.
test-oldest: PYTHON = python3.10
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.venv-oldest/installed: $(wildcard requirements*.txt) | python
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c requirements-oldest.txt -r requirements.txt -r requirements-dev.txt
	touch $@

bench: .venv/installed
	$(BIN)/python -m benchmarks --json benchmarks.json

ifeq ($(origin PYTHON),file)
gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu
else
gpu:
	$(PYTHON) -m benchmarks.gpu
endif

soak: .venv/installed
	SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

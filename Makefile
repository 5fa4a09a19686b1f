# make demo: trains and evaluates TBPS-CLIP on generated pedestrians; works on a fresh machine.
# make test: runs all tests. make lint: checks the style and the types.
# make bench: measures speed next to the published way of doing the same work; prints tables, writes benchmarks.json.
# make soak: kills a training KILLS times (about ten seconds each), and compares it with an undisturbed training.

PYTHON ?= python3
BIN := .venv/bin
KILLS ?= 200

.PHONY: demo test bench soak lint

# Installs again when the requirements change.
.venv/installed: requirements.txt requirements-search.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old, 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: .venv/installed
	@echo "The demo trains simplified TBPS-CLIP (N-ITC and R-ITC) with tiny encoders; the full recipe takes three times as long."
	$(BIN)/python -m misc.pedestrians data/pedestrians
	$(BIN)/torchrun --standalone --nproc_per_node=2 main.py --config config/demo.config.yaml --simplified --overwrite
	@echo "Queries with their first ten results: runs/demo/retrieval.png; the curve: runs/demo/curve.png"

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

bench: .venv/installed
	$(BIN)/python -m benchmarks --json benchmarks.json

soak: .venv/installed
	SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

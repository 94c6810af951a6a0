# make demo    train a small GPT with clipping: a table and demo.png (STEPS=, DEVICE=, SEEDS= ...)
# make test    lint, types and tests
# make mutants break the code on purpose and see the tests fail
# make gpu     the GPU tests, with the torch that is there

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?= 100
DEVICE ?= cpu
SEEDS ?= 0
OUT ?= demo.png

.PHONY: demo test lint types pytest mutants gpu clean

demo: $(VENV)/ready
	$(BIN)/python -m bench.demo --steps $(STEPS) --device $(DEVICE) --seeds $(SEEDS) --out $(OUT)

test: lint types pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy compileclip passes bench

pytest: $(VENV)/ready
	$(BIN)/python -m pytest

mutants: $(VENV)/ready
	$(BIN)/python tests/mutants.py

# No virtual environment: on a GPU machine the torch that fits its driver is installed already.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest -m gpu

# Made anew when what it installs changes; afterwards no target needs a network.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo.png

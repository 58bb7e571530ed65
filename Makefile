# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo    install into .venv and run the whole tour on the bundled fixture
#   make test    install the test tools too and run the tests

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint format zoo bench fixtures clean

demo: .venv/installed
	$(BIN)/bnctl demo --output demo-out --force

test: .venv/dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Slow: bnctl and its peers on real architectures; goes on where it stopped (zoo-results/), then writes docs/zoo.md.
# ZOO='--tool bnctl --onnx FOLDER --python aimet=PATH' and so on: see benchmarks/zoo.py.
zoo: .venv/dev
	$(BIN)/python benchmarks/zoo.py $(ZOO)
	$(BIN)/python benchmarks/zoo.py --write docs/zoo.md

# Slow: cost of capture, fold and verification, measured.
bench: .venv/dev
	$(BIN)/python benchmarks/commands.py

# Only needed when fixtures/build.py changes: what it writes is committed.
fixtures: .venv/dev
	$(BIN)/python fixtures/build.py

clean:
	rm -rf .venv demo-out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bnctl needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

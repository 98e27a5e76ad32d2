# Everything runs in .venv, which is made once. PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests hold misspelled keys on purpose.
PROSE := $(wildcard src docs recipes benchmarks README.md)
# Two test workers with two threads each would wait for each other on two cores.
export OMP_NUM_THREADS = 1

.PHONY: demo test test-all gpu check format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

# Four specialists, one student on real text and its exports; ends with runs/demo/report.html.
demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP)
	$(BIN)/collegium demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=
	$(BIN)/coverage report --skip-covered --include='*/collegium/fusion/*,*/collegium/losses/*,*/collegium/train/*' --fail-under=95

# All cases of all sweeps: `make test` runs a fixed sample of the longest ones.
test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --all

# All tests and benchmarks that need a GPU, into runs/gpu. Toy sizes on the CPU: make gpu ARGS=--dry-run
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell $(PROSE)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* htmlcov

PYTHON ?= python3
BIN = .venv/bin

.PHONY: try demo test test-slow lint docs

try: .venv/ready
	$(BIN)/python data/demo/try.py

demo: .venv/ready
	$(BIN)/python data/demo/run.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

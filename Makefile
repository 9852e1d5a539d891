# Each target sets up what it needs: a virtual environment in .venv with the requirements.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/runtime
	$(BIN)/python tools/demo.py --out demo

test: .venv/tests lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/tests: .venv/runtime tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv demo

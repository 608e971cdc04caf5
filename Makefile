# make demo and make test work on a machine with Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/.installed
	$(BIN)/featprobe demo

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[embedded,dev]"
	touch $@

clean:
	rm -rf .venv

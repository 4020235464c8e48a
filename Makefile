# Every target sets itself up: a virtual environment in .venv, made with what Python brings, and the pinned
# packages of constraints.txt. The two stamp files remember what is installed.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: starter test lint docs dist
starter: .venv/installed  ## train, measure and show a small model; ARGS=--short takes two minutes, ARGS=--full longer
	$(BIN)/tinyllava starter $(ARGS)

test: .venv/installed-dev  ## the whole test suite; ARGS="-k connector" runs a part of it
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 $(ARGS)

lint: .venv/installed-dev  ## style, types, layers, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

docs: .venv/installed-dev  ## the docs site, into build/site; warnings are errors, links and commands are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/pytest tests/test_docs.py tests/test_readme.py

dist: .venv/installed-dev  ## sdist and wheel, into dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# pip reaches into .venv from outside, so that a Python without ensurepip (Debian's) will do.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tinyllava needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --without-pip .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip --python .venv/bin/python install --constraint constraints.txt --editable '.[report]'
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip --python .venv/bin/python install --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed

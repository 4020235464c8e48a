# Every target sets itself up: a virtual environment in .venv, made with what Python brings, and the pinned
# packages of constraints.txt. The two stamp files remember what is installed.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: starter test test-older test-newest test-lowest lint docs dist
starter: .venv/installed  ## train, measure and show a small model; ARGS=--short takes two minutes, ARGS=--full longer
	$(BIN)/tinyllava starter $(ARGS)

test: .venv/installed-dev  ## the whole test suite; ARGS="-k connector" runs a part of it
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 $(ARGS)

# What every release of a dependency can break: model, training, generation, import, export, evaluation.
CORE := tests/model/test_compat.py tests/model/test_linear.py tests/model/test_modeling.py tests/training/test_run.py \
	tests/training/test_adapters.py tests/inference/test_chat.py tests/inference/test_shared_prefix.py \
	tests/checkpoints/importing/test_stock.py tests/checkpoints/exporting/test_stock.py \
	tests/evaluation/test_run.py

test-newest test-lowest: test-%: .venv-%/installed  ## the core of the tests, on the newest or the lowest dependencies
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n auto --maxprocesses 8 $(or $(ARGS),$(CORE))

test-older: .venv/installed-dev .venv/older/installed  ## exports opened with transformers 4.57
	TINYLLAVA_OLDER_PYTHON=$(CURDIR)/.venv/older/bin/python $(BIN)/pytest -q -m older tests/checkpoints/exporting

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

TEST_TOOLS := hypothesis pytest pytest-timeout pytest-xdist

# Only CUDA builds can be had of other releases of torch, so its pin stays.
.venv-newest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/pip install --upgrade --upgrade-strategy eager --constraint .venv-newest/constraints.txt --editable '.[all]' $(TEST_TOOLS)
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --constraint constraints-lowest.txt --editable '.[all]' $(TEST_TOOLS)
	touch $@

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip --python .venv/bin/python install --constraint constraints.txt --editable '.[report,serve]'
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip --python .venv/bin/python install --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed

.venv/older/installed: .venv/bin/python
	$(PYTHON) -m venv --without-pip .venv/older
	$(PYTHON) -m pip --python .venv/older/bin/python install torch==2.13.0 transformers==4.57.6 pillow
	touch $@

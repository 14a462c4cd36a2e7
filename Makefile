# make demo: the results table of the sample; make test: the tests.  VENV=DIR reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

demo: $(VENV)/.installed
	$(BIN)/python reproduce.py --recipe recipes/sample.toml --out runs/sample
	$(BIN)/python -m eval.report runs/sample

test: $(VENV)/.installed-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -m slow

test-faults: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -m faults

test-scale: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -m scale

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt eval/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: demo test test-slow test-faults test-scale

# make demo: a table of results on the sample; make test: the tests; make gpu OUT=runs/gpu
# DATA=datasets: what is to be measured on a GPU, goes on after a kill.  VENV=DIR: your environment.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
OUT ?= runs/gpu
DATA ?= datasets

demo: $(VENV)/.installed
	$(BIN)/python reproduce.py --recipe recipes/sample.toml --out runs/sample
	$(BIN)/python -m eval.report runs/sample

gpu:  # installs nothing: such machines often have no network
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(OUT) $(DATA)

test: $(VENV)/.installed-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow test-faults test-scale: test-%: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -m $*

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt eval/requirements.txt data/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: demo gpu test test-slow test-faults test-scale

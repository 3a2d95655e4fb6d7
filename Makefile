# make demo   a trained model, a report and a sample, from nothing but Python and this folder
# make test   the whole suite                make quick  all but slow tests
# make lint   ruff and mypy                  make clean  all but runs/
#
# Everything is installed into .venv, editable, at the versions of constraints.txt. The stamps make a second call
# start at once; they are renewed when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location \
          --root-user-action ignore --constraint constraints.txt
# A worker for each core. The tests of a file stay together, since they share what is costly to make.
WORKERS := -n auto --dist loadfile
CACHES := build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test quick lint clean

demo: $(VENV)/.installed
	$(BIN)/moestro train --preset demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS)

quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CACHES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV), with what the tests need (a few minutes the first time)"
	@$(PIP) --editable ".[test]"
	@touch $(VENV)/.installed $@

# A half-made environment is removed, so that the next call starts afresh.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Moestro needs Python 3.11 or newer, and '$(PYTHON)' is not; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || { \
	  cat $(VENV).log >&2; rm -rf $(VENV) $(VENV).log; \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@rm -f $(VENV).log

# make demo   a trained model, a report and a sample, from nothing but Python and this folder
# make test   the whole suite                make quick  all but slow tests
# make lint   ruff, clang-format, mypy       make clean  all but runs/
#
# Everything is installed into .venv, editable, at the versions of constraints.txt. The stamps make a second call
# start at once; they are renewed when the requirements, the kernels or what builds them change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location \
          --root-user-action ignore --constraint constraints.txt
CSRC   := $(filter-out csrc/abi/generated.h,$(wildcard csrc/*/*.h csrc/*/*.cpp))
NEEDS  := pyproject.toml constraints.txt setup.py moestro/ops/abi.py $(CSRC)
CACHES := build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

NEWER  := 3.12 3.13  # what lint checks beside the Python that runs it

# A worker for each core. The tests of a file stay together, since they share what is costly to make.
WORKERS := -n auto --dist loadfile

.PHONY: demo test quick lint clean

demo: $(VENV)/.installed
	$(BIN)/moestro train --preset demo
	@echo "To type moestro without its folder: . $(BIN)/activate"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS)

quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy
	@for version in $(NEWER); do \
	  echo "$(BIN)/mypy --python-version $$version" && $(BIN)/mypy --python-version $$version || exit 1; \
	  python$$version --version >/dev/null 2>&1 || { echo "no python$$version here: compiled nothing with it"; continue; }; \
	  echo "python$$version -m compileall" && PYTHONPYCACHEPREFIX=build/pycache \
	    python$$version -W error -m compileall -qf moestro tests bench setup.py || exit 1; \
	done

clean:
	rm -rf $(VENV) $(CACHES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(NEEDS) | $(BIN)/pip
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

# Without kernels the tests of most of Moestro would be skipped, so where they can be built they have to be.
ifeq ($(shell uname -m),x86_64)
$(VENV)/.installed-test: export MOESTRO_REQUIRE_KERNELS ?= 1
endif
$(VENV)/.installed-test: $(NEEDS) | $(BIN)/pip
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

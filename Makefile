# Needs Python 3.11 or newer (with venv) and a C++ compiler. Everything else goes into
# .venv, once: a target installs again only after pyproject.toml or constraints.txt
# changed. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

# sgdgp with the extras $(1). uv needs a quarter of pip's time, but does not read pip's
# configuration: where it finds no packages, pip is asked.
define install
@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(1)]' || \
  $(PIP) install --quiet -c constraints.txt -e '.[$(1)]'
endef

# Two test processes with one thread each. Set here and not in Python: threads are
# counted when the first library loads, and too many of them spin more than they work.
WORKERS ?= 2
THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-short test test-slow lint format notebook docs wheel clean

help:                 ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/installed-demo  ## 20,000 points of a known function, against the truth
	$(BIN)/python -m benchmarks.demo

demo-short: $(VENV)/installed-demo  ## the same on fewer points
	$(BIN)/python -m benchmarks.demo --short

test: $(VENV)/installed-test  ## the test suite, README snippets included
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/installed-test  ## the tests marked slow
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS)

lint: $(VENV)/installed-dev  ## ruff (check and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebook: docs/tutorials/executed  ## execute the notebooks in their short form

docs: docs/tutorials/executed $(VENV)/installed-dev  ## build/site, and check its links
	$(BIN)/python -m sphinx -W --keep-going -q -j auto docs build/site
	$(BIN)/python -m pytest -n 0 tests/test_site.py

# Pages of the site are copies of the notebooks, with what they print.
docs/tutorials/executed: $(wildcard notebooks/*.ipynb) $(shell find sgdgp -name '*.py') \
  | $(VENV)/installed-test
	rm -rf $(@D) && mkdir -p $(@D) && cp notebooks/*.ipynb $(@D)
	OMP_NUM_THREADS=$(THREADS) SGDGP_SHORT=1 $(BIN)/python -m pytest -n $(WORKERS) --nbmake \
	  --nbmake-timeout=600 --overwrite $(@D)
	@touch $@

wheel: $(VENV)/installed-dev  ## build the source archive, and the wheel from it
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:                ## remove the environment and everything built
	rm -rf $(VENV) build dist docs/tutorials docs/reference .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and by its exact version: where a build without CUDA is offered it
# is taken, and no later requirement asks for another.
$(VENV)/installed-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sgdgp needs Python 3.11 or newer, found $$($(PYTHON) --version 2>&1)" \
	         "as '$(PYTHON)'; say which one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "'$(PYTHON)' cannot make virtual environments: its modules venv and" \
	         "ensurepip are missing (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing $(TORCH) into $(VENV), once ...'
	@$(PIP) install --quiet -c constraints.txt '$(TORCH)' uv
	@touch $@

# What the tests need includes what the demo does, and the tools what the tests do.
$(VENV)/installed-demo: $(VENV)/installed-torch pyproject.toml
	@echo 'installing sgdgp and what the demo needs into $(VENV), once ...'
	$(call install,plot)
	@touch $@

$(VENV)/installed-test: $(VENV)/installed-torch pyproject.toml
	@echo 'installing sgdgp and what the tests need into $(VENV), once ...'
	$(call install,test)
	@touch $@ $(VENV)/installed-demo

$(VENV)/installed-dev: $(VENV)/installed-torch pyproject.toml
	@echo 'installing sgdgp and the development tools into $(VENV), once ...'
	$(call install,dev)
	@touch $@ $(VENV)/installed-test $(VENV)/installed-demo

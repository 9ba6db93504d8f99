# make demo, make test: everything from nothing, on a machine that has Python 3.11+ and make.
# A machine whose `pip install torch` would fetch CUDA, and that wants the CPU build: make demo TORCH_FLAGS="--index-url <PyTorch's CPU index>"

PYTHON ?= python3
VENV ?= .venv
TORCH_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: help install demo test test-slow check format clean

help:
	@echo "make demo       train a small model on real text in minutes, and see it write"
	@echo "make test       the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      style, types, import layers"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove the environment and caches (keeps data/ and runs/)"

# torch comes first and alone, pinned: whatever build of it is found then stays.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"pathlm needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV)"
	@$(PIP) install $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing pathlm into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	@echo "installing pathlm and its development tools into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.installed $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/pathlm demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

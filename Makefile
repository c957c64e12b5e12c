# Everything runs in .venv, made from constraints.txt; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEV := build hatchling hypothesis mypy pytest pytest-xdist ruff tensorboardX types-PyYAML
# One thread a process: tests start several, and two processes on shared threads are slower than on their own.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo quick test lint test-distributed test-faults bench docs clean

setup: $(VENV)/.installed

# torch comes first and by its pinned version, so that nothing later pulls another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . $(DEV)
	touch $@

# Only the distributed tests use DeepSpeed. It is built against the torch that is there, and compiles nothing.
$(VENV)/.deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

demo: setup
	$(BIN)/halfbyte demo

quick: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m quick

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not distributed and not faults"

test-distributed: $(VENV)/.deepspeed
	$(TEST_ENV) $(BIN)/python -m pytest -n logical --maxprocesses 2 --dist loadfile -m distributed

test-faults: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n logical --maxprocesses 2 --dist loadfile -m faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(TEST_ENV) $(BIN)/python -m tests.benchmarks

docs: setup
	$(TEST_ENV) $(BIN)/python -m tests.documentation

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist

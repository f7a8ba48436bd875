# `make demo` and `make test` work as the first command: they make .venv, install what is pinned, build and go.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*/*) $(wildcard tests/*.cpp)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test test-all lint format wheel sanitize bench readme clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@sh tests/check_tools.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(wildcard csrc/*/*)
	@echo "building torch_slide (a minute)"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/.built  ## train dense and sparse next-token models side by side (6 minutes), table and plot
	$(BIN)/python examples/demo.py

test: $(VENV)/.built  ## the tests, without those marked slow
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.built  ## all tests
	$(PYTEST)

lint: $(VENV)/.built  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed  ## formats Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/.installed  ## an abi3 wheel in dist/, installed into an empty environment and tried
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	tests/wheel_smoke.sh $(BIN)/python dist/*.whl

sanitize: $(VENV)/.installed  ## the C++ under AddressSanitizer, UndefinedBehaviorSanitizer and valgrind
	tests/sanitize.sh $(BIN)/python

bench: $(VENV)/.built  ## every benchmark of time in a short form: the whole table in under 10 minutes
	$(BIN)/python benchmarks/suite.py

readme: $(VENV)/.installed  ## the tables and pictures of the READMEs from benchmarks/results
	$(BIN)/python benchmarks/readme_tables.py
	$(BIN)/python benchmarks/plots.py

clean:  ## removes what was built
	rm -rf build dist *.egg-info torch_slide/*.so $(VENV)/.built

# `make demo` trains a small model on this machine; `make test` runs everything; both do all set-up first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed.stamp
# Files of tests run side by side: much of a test's time is waiting for processes to start.
WORKERS ?= 2
AT_ONCE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: setup test lint parity full-width faults demo

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	$(VENV)/bin/python -m megatronish.native
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	sh tests/install_tools.sh
	$(VENV)/bin/python -m pytest $(AT_ONCE) -rs

parity: setup
	$(VENV)/bin/python -m pytest $(AT_ONCE) --dist load -m parity_all

full-width: setup
	$(VENV)/bin/python -m pytest -m full_width

faults: setup
	sh tests/install_tools.sh
	$(VENV)/bin/python -m pytest tests/launch -m slow_faults

demo: setup
	$(VENV)/bin/python -m megatronish.demo

# make demo       the main job, on data that ships with the package
# make test       the quick tests, one process per core, at most 8 (each loads torch)
# make test-all   all tests, those marked slow too
# make check      lint, formatting and types
# make docs       the documentation site, in site/
# make notebooks  run the notebooks of docs/notebooks and store their output
#
# Each sets up $(VENV) first. A torch >= 2.10 that $(PYTHON) can import is used; where there is none, $(TORCH) is installed
# from the index that pip is set to. To choose another one:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

bin := $(VENV)/bin
sources := setup.py pyproject.toml $(shell find csrc -type f)
has_torch := import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))

pytest = $(bin)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all check docs notebooks clean

demo: $(VENV)/.installed-cli
	$(bin)/blockhess demo

test: $(VENV)/.installed-test
	$(pytest) -m "not slow"

test-all: $(VENV)/.installed-test
	$(pytest)

check: $(VENV)/.installed-lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(bin)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=true $(bin)/mkdocs build --strict

notebooks: $(VENV)/.installed-test
	$(bin)/python -m tests.helpers.notebooks

clean:
	rm -rf $(VENV) build site *.egg-info blockhess_ext/*.so

$(VENV)/.torch:
	@if $(PYTHON) -c "$(has_torch)" 2>/dev/null; \
	 then $(PYTHON) -m venv --system-site-packages $(VENV); \
	 else $(PYTHON) -m venv $(VENV); fi || \
	 { echo "make: $(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv)"; exit 1; }
	@$(bin)/python -c "$(has_torch)" 2>/dev/null || $(bin)/python -m pip install -q $(TORCH)
	$(bin)/python -m pip install -q "setuptools>=77" wheel pybind11 ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(sources)
	$(bin)/python -m pip install -q --no-build-isolation -e .
	@touch $@

# pip keeps what is installed, compiled once for all extras, and adds what the extra asks for.
$(VENV)/.installed-%: $(VENV)/.installed
	$(bin)/python -m pip install -q "blockhess[$*]"
	@touch $@

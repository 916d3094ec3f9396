# The environment is a folder; a stamp inside it says what was installed from which pins.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
EXTRAS := all,ray,peers,docs,dev

.DEFAULT_GOAL := help
.PHONY: help compare test test-gguf asan fuzz lint lines docs bench clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

compare: $(VENV)/.installed  ## train all variants on the built-in text and print the table
	@$(BIN)/sqa compare demo

test: lint  ## everything that must pass: formatting, types, the whole test suite
	@SQA_ALL_EXTRAS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-gguf: $(VENV)/.installed-dev  ## llama.cpp itself reads an export: builds llama-cpp-python first, some ten minutes
	@$(INSTALL) llama-cpp-python==0.3.36
	@$(BIN)/python -m pytest tests/interop/test_llama_cpp.py

asan: $(VENV)/.installed-dev  ## our own kernel under g++'s address sanitizer, with right and wrong input: a few minutes
	@$(BIN)/python tests/fuzz/boundary.py --sanitize --minutes 2

MINUTES ?= 20
SEED ?= 0
fuzz: $(VENV)/.installed-dev  ## random input to kernel and commands, MINUTES minutes each, from case number SEED
	@$(BIN)/python tests/fuzz/kernel.py --minutes $(MINUTES) --seed $(SEED)
	@$(BIN)/python tests/fuzz/commands.py --minutes $(MINUTES) --seed $(SEED)

lint: $(VENV)/.installed-dev lines  ## formatting and types only
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

lines:  ## lines of Python in each folder of the package
	@cd src/sqa && find . -name '*.py' | xargs wc -l | awk '$$2 != "total" { n = split($$2, part, "/"); \
		lines[n > 2 ? part[2] "/" : "."] += $$1; all += $$1 } \
		END { for (folder in lines) print lines[folder], folder | "sort -n"; close("sort -n"); print all, "in all" }'

docs: $(VENV)/.installed-dev  ## the documentation site in site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html."

bench: $(VENV)/.installed  ## time whole training steps of the variants side by side
	@$(BIN)/sqa bench step

clean:  ## delete the environment and every cache; runs/ stays
	@rm -rf $(VENV) dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@[ -x $(BIN)/pip ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sqa needs Python 3.11 or newer: name one with 'make PYTHON=...'." >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes the first time."
	@$(INSTALL) -e '.[report]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)."
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

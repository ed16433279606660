# contentfilter: everything that a clone needs, each as one command. `make` alone lists them.
#
# On Debian, as root, missing packages are installed; otherwise the command names them (tools/prepare.sh).
# Python lives in .venv, made with the first python3 of 3.11 or later; PYTHON=... chooses another.

BIN := .venv/bin
# meson, which pip calls to build the wheel, is in .venv too.
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip --disable-pip-version-check --quiet
C_SOURCES := $(wildcard queue_hook/*.c)
C_HEADERS := $(wildcard queue_hook/*.h)

# Safe path: the installed package, not this directory's. Bytecode, which some machines switch off, saves each process
# of the tests the compilation of all of them.
PYTEST := PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest

# What the wheel is made of. Directories count too: their time changes when a file goes away.
WHEEL := meson.build README.md tools/toml_page.py $(shell find contentfilter queue_hook etc -name '__pycache__*' -prune -o -print)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: ## set everything up, then watch real messages go through hook, daemon and scanners
	@tools/prepare.sh packages demo
	@$(MAKE) --silent .venv/installed
	@$(BIN)/python bench/demo.py

test: ## set everything up, then check the style and run the tests
	@tools/prepare.sh packages test
	@$(MAKE) --silent --jobs=2 lint compiled
	@$(PYTEST) -n auto

bench: ## set everything up, then measure everything beside its target (a quarter of an hour); BENCH="--quick" and other options
	@tools/prepare.sh packages bench
	@$(MAKE) --silent .venv/benching
	@$(BIN)/python bench/run.py $(BENCH)

coverage: ## set everything up, then run the tests and say which lines and branches they do not reach
	@tools/prepare.sh packages test
	@$(MAKE) --silent .venv/covering
	@$(BIN)/python tools/measure_coverage.py $(TESTS)

faults: ## set everything up, then let every system call of the hook fail in every way (make test tries a sample)
	@tools/prepare.sh packages test
	@$(MAKE) --silent .venv/testing
	@CONTENTFILTER_FAULTS=all $(PYTEST) -n auto tests/hook/test_every_call.py

soak: ## set everything up, then ten minutes of mail under load while the daemon is ended in every way
	@tools/prepare.sh packages bench
	@$(MAKE) --silent .venv/installed
	@$(BIN)/python bench/soak.py

attack: ## set everything up, then a minute of each attack beside honest mail, as root (two hours); ATTACK="--list"
	@tools/prepare.sh packages bench
	@$(MAKE) --silent .venv/installed
	@$(BIN)/python bench/attack.py $(ATTACK)

fuzz: ## set everything up, then feed hostile bytes to every parser, SECONDS (60) for each; not part of the tests
	@tools/prepare.sh packages fuzz
	@$(MAKE) --silent .venv/fuzzing
	@PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),60) $(TARGETS)

setup: ## Debian packages, and .venv with contentfilter and the tools of its tests
	@tools/prepare.sh packages setup
	@$(MAKE) --silent .venv/testing

lint: .venv/testing build/hook/warnings ## the style alone: ruff, mypy, and the hook's warnings
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

compiled: .venv/testing
	@mkdir -p build
	@$(PYTEST) --collect-only --quiet --quiet >build/collected || { cat build/collected; exit 1; }

hook: $(addprefix build/hook/contentfilter-queue.,musl glibc sanitized) ## the hook alone, in build/hook: with musl, glibc, sanitizers

wheel: .venv/installed ## the installable file, in dist
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove everything that these commands made
	rm -rf .venv build dist bench/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find contentfilter tests bench -name __pycache__ -prune -exec rm -rf {} +

# Stamps. The environment, then the package in it, then the tools of the tests.

.venv/bin/python:
	@python=$$(tools/prepare.sh python) && echo "making .venv with $$($$python --version)" && \
	$$python -m venv --clear .venv

.venv/build-tools: pyproject.toml | .venv/bin/python
	@$(PIP) install --upgrade pip  # Debian's lacks the Windows launchers, which the tests take as samples
	@$(PIP) install 'meson-python>=0.17' ninja
	@touch $@

.venv/installed: .venv/build-tools $(WHEEL)
	@echo "installing contentfilter into .venv"
	@$(PIP) install --no-build-isolation .
	@touch $@

.venv/testing: .venv/installed
	@echo "installing the tools of the tests"
	@$(PIP) install 'contentfilter[test]'
	@touch $@

.venv/benching: .venv/installed
	@echo "installing the plots of the bench"
	@$(PIP) install 'contentfilter[bench]'
	@touch $@

.venv/fuzzing: .venv/testing
	@echo "installing the fuzzer"
	@$(PIP) install 'contentfilter[fuzz]'
	@touch $@

.venv/covering: .venv/testing
	@echo "installing coverage"
	@$(PIP) install 'contentfilter[coverage]'
	@touch $@

# The hook. Warnings are errors here and nowhere else: a user's newer compiler may know new ones.

STRICT := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wconversion -Wformat=2 -Wstrict-prototypes -Werror
HOOK := build/hook/contentfilter-queue

$(HOOK).musl: COMPILE = musl-gcc -O2 -static -Wl,-z,noseparate-code -Wl,-z,norelro
$(HOOK).glibc: COMPILE = gcc -O2 -static -Wl,-z,noseparate-code
$(HOOK).sanitized: COMPILE = gcc -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
$(HOOK).%: $(C_SOURCES) $(C_HEADERS) Makefile
	@mkdir -p build/hook
	$(COMPILE) $(STRICT) -o $@ $(C_SOURCES)

build/hook/warnings: $(C_SOURCES) $(C_HEADERS) Makefile
	@mkdir -p build/hook
	@gcc -fsyntax-only $(STRICT) $(C_SOURCES)
	@touch $@

.PHONY: help demo test bench coverage faults soak attack fuzz setup lint compiled hook wheel clean

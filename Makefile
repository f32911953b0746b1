# Set-up, demo, tests and checks. `make` alone lists the targets.
# Every target makes what it needs: .venv is set up once, and again when a build file or the C++ changes.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
SET_UP := $(VENV)/.set-up
# Before the rest, so that no other package chooses a torch. Measured with this one; see docs/log.md.
TORCH := torch==2.13.0
# Of the 19,000 modules that are installed few are ever imported; those are compiled then.
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo test faults check soak wheel-check gpu-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(SET_UP)  ## set-up, then the whole path on this machine: about 5 minutes on two cores
	@$(VENV)/bin/orchestrate demo
	@echo
	@echo "For your own work: $(VENV)/bin/orchestrate --help, or 'source $(VENV)/bin/activate' and then orchestrate."

# Two at a time: they wait more than they compute. What a file shares is made once for it.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test: $(SET_UP)  ## set-up, then every test but the slow faults: about 27 minutes on two cores
	$(PYTEST) -m "not fault" $(PYTEST_ARGS)
	@echo
	@echo "For your own work: $(VENV)/bin/orchestrate --help, or 'source $(VENV)/bin/activate' and then orchestrate."

check: $(SET_UP)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

faults: $(SET_UP)  ## every fault caused once, as root: about 7 minutes on two cores
	$(PYTEST) -m fault $(PYTEST_ARGS)

soak: $(SET_UP)  ## a run that meets a random chain of faults, as root; SOAK_ARGS="--seed N --faults 10"
	$(VENV)/bin/python -m tests.soak $(SOAK_ARGS)

wheel-check: $(SET_UP)  ## build sdist and wheel, install them into a clean environment, and work there
	$(VENV)/bin/python tests/wheel_check.py $(TORCH)

# With another Python than .venv's: one that has a CUDA build of torch. What it lacks besides comes as wheels.
GPU_PYTHON ?= python3
gpu-check:  ## one Hopper GPU, offline, 8 minutes: WHEELS=FOLDER (docs/precision.md says which), GPU_PYTHON=python3
	@test -z "$(WHEELS)" -o -n "$(wildcard $(WHEELS)/*.whl)" || { echo "WHEELS should name a folder with wheels, and there are none in '$(WHEELS)'; docs/precision.md says which" >&2; exit 2; }
	@mkdir -p build && site=$$(mktemp -d "$(CURDIR)/build/gpu-check-XXXXXX") && trap 'rm -rf "$$site"' EXIT \
	  && if test -n "$(WHEELS)"; then $(GPU_PYTHON) -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --target "$$site" $(WHEELS)/*.whl; fi \
	  && PYTHONPATH="$$site:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info tokenize/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(SET_UP): pyproject.toml setup.py $(wildcard tokenize/native/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and no python3 is on PATH; install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; found = sys.version_info[:2]; sys.exit(0 if (3, 11) <= found < (3, 13) else "Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; install python3.11, or say make PYTHON=/path/to/python3.11" % found)'
	@command -v g++ > /dev/null || { echo "g++ is needed, and not on PATH; install it, e.g. apt install g++" >&2; exit 1; }
	@echo "set-up 1/3: a virtual environment in $(VENV), with $$($(PYTHON) --version)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "set-up 2/3: PyTorch, the largest part (README.md says how large)"
	@$(PIP) $(TORCH)
	@echo "set-up 3/3: megatron-core, MLflow and the other requirements, about 130 packages"
	@$(PIP) --editable '.[dev]'
	@touch $@
	@echo "set-up done: $$(du -sh $(VENV) | cut -f1) in $(VENV)"

# One command a need. `make help` lists them.
#
# Variables you may set, e.g. `make demo PORT=8000`:
#   PYTHON       the Python to build .venv with (default: the first of python3, python3.13, 3.12, 3.11 that is 3.11 or newer)
#   HOST, PORT   where the hub listens (127.0.0.1:7860: this machine only)
#   TORCH_INDEX  a package index for PyTorch alone. On Linux pip's default PyTorch is the CUDA build (several GB);
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the CPU build (about 200 MB) instead.
#   SEEDS, METHODS, OUT   what `make study` runs (3, every ready method, results)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

HOST ?= 127.0.0.1
PORT ?= 7860
TORCH_INDEX ?=
SEEDS ?= 3
METHODS ?=
OUT ?= results

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamps carry a hash of what is installed from: the same files install nothing, a changed one installs again.
HASH := $(shell cat settings.ini setup.py constraints.txt requirements-data.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.stamps/run-$(HASH)
INSTALLED_DEV := $(VENV)/.stamps/dev-$(HASH)
# A time limit where the machine has the command for it.
limited = $(if $(shell command -v timeout),timeout --kill-after=30 $(1)) $(2)
# Methods that are built, and those of them that have something to train.
READY = $$($(BIN)/python -c "from hkust_demos.catalog import METHODS; print(*(name for name in METHODS if METHODS[name].ready))")
TRAINED = $$($(BIN)/python -c "from importlib import import_module as load; from hkust_demos.catalog import METHODS; print(*(m.name for m in METHODS.values() if m.ready and hasattr(load(m.command), 'train')))")

export PATH := $(CURDIR)/$(BIN):$(PATH)
test test-slow nbs docs readme bench: export HF_HUB_OFFLINE := 1
test test-slow nbs docs readme bench: export HF_HUB_DISABLE_TELEMETRY := 1
test nbs docs readme bench: export GRADIO_ANALYTICS_ENABLED := False
test test-slow nbs: export OMP_NUM_THREADS := 1
test-slow: export HKUST_RESULTS := results

.PHONY: help demo test test-slow lab nbs study bench docs readme weights clean install browser

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

demo: $(INSTALLED)  ## install what is missing and open all demos at http://127.0.0.1:7860
	@$(BIN)/hkust-demos prepare
	@echo "Opening the hub at http://$(HOST):$(PORT) (stop it with Ctrl-C)"
	@$(BIN)/hkust-demos demo --host $(HOST) --port $(PORT)

test: $(INSTALLED_DEV) browser  ## everything CI checks: library == notebooks, style, notebooks (nbdev_test), pytest; the time budget
	$(BIN)/python tools/check_export.py
	$(BIN)/python tools/check_style.py
	$(BIN)/python tools/run_notebooks.py --check
	$(BIN)/python tools/build_readme.py --check
	rm -rf build/budget
	$(call limited,1800,$(BIN)/python tools/time_budget.py notebooks)
	$(call limited,1800,$(BIN)/python -m pytest -q tests)
	$(BIN)/python tools/time_budget.py table

test-slow: $(INSTALLED_DEV)  ## what takes minutes and real processes: the federated deployment, Ray where it is installed
	$(call limited,3600,$(BIN)/python -m pytest -q -m slow -rs tests)

install: $(INSTALLED_DEV)  ## create .venv with everything, start nothing

# tools/jupyter holds settings that JupyterLab reads beside your own: no box that asks about news, no request for updates.
lab: $(INSTALLED_DEV)  ## open the notebooks in JupyterLab, the front page first
	JUPYTER_CONFIG_PATH="$(CURDIR)/tools/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" $(BIN)/jupyter lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/index.ipynb

nbs: $(INSTALLED_DEV)  ## export the library, run every notebook and store its outputs, rebuild README.md
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/build_readme.py

readme: $(INSTALLED_DEV)  ## rebuild README.md from nbs/index.ipynb
	$(BIN)/python tools/build_readme.py

study: $(INSTALLED)  ## run the studies (hours): tables and pictures into results/
	@for method in $(if $(METHODS),$(METHODS),$(READY)); do \
		$(BIN)/hkust-demos study $$method --seeds $(SEEDS) --out $(OUT); done

bench: $(INSTALLED)  ## time every method side by side with its published arithmetic
	@for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python $$file; done

docs: $(INSTALLED_DEV)  ## a site of all notebooks in _docs/, readable offline
	$(BIN)/python tools/build_docs.py

weights: $(INSTALLED)  ## train the small weights that the demos ship
	@for method in $(if $(METHODS),$(METHODS),$(TRAINED)); do \
		$(BIN)/hkust-demos train $$method; done

clean:  ## remove what was built and the caches; keep .venv
	rm -rf _docs _proc build dist *.egg-info .pytest_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=""; for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "hkust-demos needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1 | head -1). Install one and name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$$python cannot make a virtual environment. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }

# PyTorch first and alone: an open range of another package must not choose the build. The carriers of data come last,
# without their own requirements, which nothing here imports.
define install
@echo "Installing into $(VENV), this once; it takes some minutes."
$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
$(PIP) install -q -c constraints.txt -e ".$(1)"
$(PIP) install -q --no-deps -r requirements-data.txt
@mkdir -p $(@D) && rm -f $(@D)/*-* && touch $(INSTALLED) $@
endef

$(INSTALLED): | $(BIN)/python
	$(call install,)

$(INSTALLED_DEV): | $(BIN)/python
	$(call install,[dev])

# Chromium is for tests/test_browser*.py only. Where it cannot be installed they skip and say so
# (HKUST_REQUIRE_BROWSER=1, as in CI, makes that a failure).
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name >/dev/null && exit 0; done; \
	if ! command -v apt-get >/dev/null; then echo "No Chromium and no apt-get here: browser tests will be skipped"; exit 0; fi; \
	root=""; if [ "$$(id -u)" != 0 ]; then root="sudo"; command -v sudo >/dev/null || { \
		echo "No Chromium and no right to install it: browser tests will be skipped"; exit 0; }; fi; \
	{ $$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
		|| echo "Chromium could not be installed: browser tests will be skipped"

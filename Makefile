# make quickstart: from nothing to a trained and evaluated model. make test: the suite. make test-all: with the large matrices too.
# Nothing here is needed by the package itself; PYTHON=python3.12 make ... picks an interpreter.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
# More arguments for pip, for instance an index with CPU-only wheels of torch.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EVALS := $(VENV)/.installed-evals
# Transformer-Engine's Python, without what it has compiled, in a folder of its own: tests/te_on_cpu.
TE := $(VENV)/transformer-engine

# A machine's threads are shared by local ranks, and idle OpenMP threads must not spin against them.
export OMP_NUM_THREADS := 1
export GOMP_SPINCOUNT := 0

.PHONY: docs help quickstart test test-all lint pytest matrices transformer-engine apptainer security soak preempted killed clean

help:
	@echo "make quickstart   install, prepare real data, train, evaluate, export and draw on this machine"
	@echo "make test         install, lint and run the tests"
	@echo "make test-all     the same, and every combination of layouts and features (tests marked exhaustive)"
	@echo "make security     hostile inputs and fuzzers, about an hour"
	@echo "make lint         ruff, mypy and import contracts only"
	@echo "make docs         the documentation as a site in .site; fails on a broken link"
	@echo "make soak         200 random kills of a run, which ends with the same numbers"
	@echo "make preempted    20 random preemptions of a run on a local SLURM, which ends with the same numbers"
	@echo "make killed       the quickstart, killed in three places, ends with the same numbers"
	@echo "make clean        remove $(VENV) and caches; runs stay"

# Depends on what decides the packages; installing twice changes nothing.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no $(PYTHON)" >&2; \
	  echo "remedy: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), mmscale needs Python 3.11 or newer" >&2; \
	  echo "remedy: name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment" >&2; \
	  echo "remedy: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# What the tests alone need: half a minute more, which the quickstart does without.
$(EVALS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev,evals]'
	@touch $@

# Without a network its tests skip, and fail where CI is set.
$(TE)/.unpacked: $(STAMP) tests/te_on_cpu/requirements.txt
	@rm -rf $(TE)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps --only-binary=:all: \
	  --require-hashes --target $(TE) -r tests/te_on_cpu/requirements.txt && touch $@ || \
	  echo "note: Transformer-Engine's Python could not be downloaded; the tests over it will skip" >&2

transformer-engine: $(TE)/.unpacked

# For tests/slurm/test_containers.py; without it those of apptainer skip. As root, on Debian.
apptainer: $(VENV)/apptainer/bin/apptainer

$(VENV)/apptainer/bin/apptainer: tests/slurm/get_apptainer.sh $(STAMP)
	tests/slurm/get_apptainer.sh $(VENV)/apptainer

# The second time everything is there: preparing, training and exporting say so, and only evaluations and pictures are made
# again. STRICT=--strict: fail where the model misses a target.
RUN := runs/quickstart
DIGITS := zero one two three four five six seven eight nine
STRICT ?=
quickstart: $(STAMP)
	$(BIN)/mmscale data prepare configs/quickstart.yaml --out data/digits
	$(BIN)/mmscale train configs/quickstart.yaml --nproc 2
	$(BIN)/mmscale train configs/quickstart.yaml --stage auxiliary --nproc 2
	$(BIN)/mmscale eval $(RUN) --routing causal
	$(BIN)/mmscale convert to-hf $(RUN) $(RUN)/hf
	$(BIN)/mmscale eval $(RUN)/hf --json > $(RUN)/evaluation.json
	$(BIN)/mmscale sample $(RUN)/hf $(foreach digit,$(DIGITS),--prompt "draw a $(digit)") --count 20 --guidance 2 --recognise \
	  --out $(RUN)/drawings --json > $(RUN)/drawings.json
	$(BIN)/mmscale report $(RUN) --out $(RUN)/curves.png
	$(BIN)/mmscale report $(RUN) --out $(RUN)/report.html --no-png
	@$(BIN)/python tests/quickstart_summary.py $(RUN) $(STRICT)

test: lint pytest

test-all: test matrices

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ranks of the suite are forks that compute on the CPU, also where there are GPUs; what needs one runs after it.
pytest: $(STAMP) $(EVALS) $(TE)/.unpacked
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null; then set -x; $(BIN)/python -m pytest tests/gpu; fi

# What takes too long for every change. MATRICES=tests/distributed/test_layouts.py: only those of some files.
MATRICES ?=
matrices: $(STAMP) $(EVALS) $(TE)/.unpacked
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m exhaustive $(MATRICES)

# Pages of settings and commands are generated from the code (mkdocs.yml).
DOCS := $(VENV)/.installed-docs
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site: .site/index.html"

# Files, pickles, images and archives that want to do harm, and changed ones by the ten thousands: about an hour.
SECURITY := tests/unit/test_bounded.py tests/unit/test_wheel.py tests/unit/checkpoint/test_pickles.py \
  tests/unit/data/test_hostile_files.py tests/unit/data/test_documents.py tests/unit/data/test_digests.py \
  tests/unit/checkpoints_tools/test_image_bounds.py tests/unit/checkpoints_tools/test_ckpt.py \
  tests/unit/config/test_load.py tests/end_to_end/test_secrets.py
security: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "exhaustive or not exhaustive" $(SECURITY)

# The suite does 30.
KILLS := 200
soak: $(STAMP)
	MMSCALE_KILLS=$(KILLS) $(BIN)/python -m pytest -q -s -W ignore tests/end_to_end/test_kills.py -k random

# The suite does two; about twenty seconds each.
preempted: $(STAMP)
	MMSCALE_PREEMPTIONS=20 $(BIN)/python -m pytest -q -s -W ignore tests/slurm/test_preemptions.py

# Beside one that nobody disturbs; the suite does the same with a tiny model.
killed: quickstart
	MMSCALE_QUICKSTART=$(CURDIR)/$(RUN) $(BIN)/python -m pytest -q -s tests/end_to_end/test_quickstart.py -k make

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

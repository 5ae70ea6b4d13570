# make quickstart trains and evaluates a model from scratch. make test runs the suite, make test-long its longer tests, make
# test-all both and the large matrices.
# The package itself needs nothing from this file. PYTHON=python3.12 make ... picks an interpreter.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
# Further arguments for pip, for instance an index with CPU-only wheels of torch.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EVALS := $(VENV)/.installed-evals
# Transformer-Engine's Python without its compiled parts, in a separate folder, for tests/te_on_cpu.
TE := $(VENV)/transformer-engine

# A machine's threads are shared by local ranks, and idle OpenMP threads must not spin against them.
export OMP_NUM_THREADS := 1
export GOMP_SPINCOUNT := 0
# Further arguments for pytest in make test and make test-long, for instance -x.
PYTEST_ARGS ?=

.PHONY: docs help tag wheelhouse quickstart test test-long test-all lint pytest matrices durations transformer-engine apptainer test-slurm-24 test-versions test-engines security soak chaos preempted killed clean

help:
	@echo "make quickstart   install, prepare real data, train, evaluate, export and draw on this machine"
	@echo "make test         install, lint and run the tests: ten minutes on two cores"
	@echo "make test-long    the longer tests, which repeat their kinds in more detail (marked long); CI runs them too"
	@echo "make test-all     both, and every combination of layouts and features (tests marked exhaustive)"
	@echo "make security     hostile inputs and fuzzers, about an hour"
	@echo "make durations    run the tests one after the other; table of what each costs"
	@echo "make lint         ruff, mypy, import contracts, and the tests that only read sources and pages"
	@echo "make docs         the documentation as a site in .site; fails on a broken link"
	@echo "make wheelhouse   wheels of mmscale and all its dependencies in wheelhouse/, for a machine without a network"
	@echo "make soak         kill a run 200 times at random; its numbers must equal an undisturbed run's"
	@echo "make chaos        disturb runs of 1, 2 and 4 ranks with 50 random events; the same (EVENTS=, SEED=)"
	@echo "make preempted    preempt a run 20 times at random on a local SLURM; its numbers must equal an undisturbed run's"
	@echo "make test-slurm-24   tests/slurm on SLURM 24.11, in a Debian 13 beside this system (root, Debian)"
	@echo "make test-versions   environments with other versions of Python, megatron-core and transformers, and their tests"
	@echo "make test-engines    tests over the Python of other versions of Transformer-Engine, without a GPU"
	@echo "make killed       kill the quickstart in three places; its numbers must equal an undisturbed run's"
	@echo "make clean        remove $(VENV) and caches; runs stay"

# Reinstalls only when the files that select the packages change.
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

# Packages that only the tests need: half a minute that the quickstart saves.
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

# Everything that a machine without a network needs, for this machine's kind and Python. There:
#   pip install --no-index --find-links wheelhouse -c constraints.txt 'mmscale[hf,data]'
WHEELHOUSE ?= wheelhouse
EXTRAS ?= hf,data
wheelhouse:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no $(PYTHON)" >&2; exit 1; }
	@mkdir -p $(WHEELHOUSE)
	$(PYTHON) -m pip wheel --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -w $(WHEELHOUSE) '.[$(EXTRAS)]'
	@cp constraints.txt $(WHEELHOUSE)/
	@echo "$(WHEELHOUSE): $$(ls $(WHEELHOUSE)/*.whl | wc -l) wheels, $$(du -sh $(WHEELHOUSE) | cut -f1)"

# Nightly. Makes the root file system the first time (300 MB). ON=tests/slurm/test_shell.py: only those of some files.
DEBIAN_13 ?= /var/tmp/mmscale-debian-13
ON ?= tests/slurm
test-slurm-24: $(STAMP)
	tests/slurm/on_debian_13.sh $(DEBIAN_13) $(ON)

# Before a release: hours, 7 GB for each Python (with CUDA builds of torch). VERSIONS='--only 3.12-0.19.2 --tests layouts'.
VERSIONS_IN ?= .versions
VERSIONS ?=
test-versions: $(STAMP)
	$(BIN)/python -m tests.versions $(VERSIONS_IN) --pip-args "$(PIP_ARGS)" $(VERSIONS)

# Before a release: Transformer-Engine's Python of other versions, in tests/te_on_cpu. ENGINES='--only 2.20.2 --tests layers'.
ENGINES ?=
test-engines: $(STAMP)
	$(BIN)/python -m tests.engine_versions $(VERSIONS_IN) --pip-args "$(PIP_ARGS)" $(ENGINES)

# A second start finds the data, the model and the export and skips those steps; it repeats only evaluations and pictures.
# STRICT=--strict: fail if the model misses a target.
RUN := runs/quickstart
DIGITS := zero one two three four five six seven eight nine
STRICT ?=
quickstart: $(STAMP)
	$(BIN)/python examples/digits/write_documents.py --out data/digits-documents
	$(BIN)/mmscale data prepare configs/quickstart.yaml --out data/digits
	$(BIN)/mmscale train configs/quickstart.yaml --nproc 2
	$(BIN)/mmscale train configs/quickstart.yaml --stage auxiliary --nproc 2
	$(BIN)/mmscale eval $(RUN) --routing causal
	$(BIN)/mmscale convert to-hf $(RUN) $(RUN)/hf
	$(BIN)/mmscale eval $(RUN)/hf --json > $(RUN)/evaluation.json
	$(BIN)/mmscale sample $(RUN)/hf $(foreach digit,$(DIGITS),--prompt "draw a $(digit)") --count 20 --guidance 2 \
	  --out $(RUN)/drawings --json > $(RUN)/drawings.json
	$(BIN)/python examples/digits/recognise.py data/digits-documents $(RUN)/drawings.json --json > $(RUN)/recognition.json
	$(BIN)/mmscale report $(RUN) --out $(RUN)/curves.png
	$(BIN)/mmscale report $(RUN) --out $(RUN)/report.html --no-png
	@$(BIN)/python tests/quickstart_summary.py $(RUN) $(STRICT)

test: lint pytest

test-all: test test-long matrices

# Tests that only read sources and pages: messages, words, structure. They take 15 s and belong to the linters.
READERS := $(addprefix tests/unit/test_,messages.py words.py tree.py clocks.py docs.py streams.py)
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q $(READERS)

# Every kind of thing that the project promises, in less than ten minutes on two cores; `test-long` has the rest of the rows
# (tests marked `long`). tests/streams.py runs each tier as several processes at once. GPU tests run afterwards, all of them.
pytest: $(STAMP) $(EVALS) $(TE)/.unpacked
	@$(BIN)/python -m tests.streams test $(PYTEST_ARGS)
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null; then set -x; $(BIN)/python -m pytest tests/gpu; fi

test-long: $(STAMP) $(EVALS) $(TE)/.unpacked
	@$(BIN)/python -m tests.streams long $(PYTEST_ARGS)

# The tables of docs/results/durations.md: the tests of both tiers, one process at a time, and what each of them cost.
DURATIONS := $(VENV)/durations.tsv
durations: $(STAMP) $(EVALS) $(TE)/.unpacked
	@rm -f $(DURATIONS)
	@failed=0; export CUDA_VISIBLE_DEVICES=; for folder in unit distributed end_to_end slurm; do \
	  $(BIN)/python -m pytest -q -p tests.durations --durations-to $(DURATIONS) tests/$$folder < /dev/null || failed=$$?; \
	done; $(BIN)/python -m tests.durations $(DURATIONS); exit $$failed

# An annotated tag v<version> with the version's section of CHANGELOG.md; refused if something of the release is missing.
tag: $(STAMP)
	@$(BIN)/python -m tests.release > .venv/tag.txt
	@git tag -a "v$$($(BIN)/mmscale --version)" --cleanup=verbatim -F .venv/tag.txt

# Tests that take too long to run on every change. MATRICES=tests/distributed/test_layouts.py: only those of some files.
# SHARD=3/12: one of twelve parts of them; the next number is the next part.
MATRICES ?=
SHARD ?= 0/1
matrices: $(STAMP) $(EVALS) $(TE)/.unpacked
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -p tests.shards --shard $(SHARD) -m exhaustive $(MATRICES)

# Pages of settings and commands are generated from the code (mkdocs.yml).
DOCS := $(VENV)/.installed-docs
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site: .site/index.html"

# Hostile files, pickles, images and archives, and tens of thousands of randomly changed ones: about an hour.
# The tests that docs/security.md names; tests/unit/test_docs.py compares.
SECURITY := tests/unit/test_bounded.py tests/unit/test_bounded_readers.py tests/unit/test_wheel.py \
  tests/unit/config/test_load.py tests/unit/checkpoint/test_archive.py \
  tests/unit/checkpoint/test_fuzzed_indices.py tests/unit/checkpoint/test_integrity.py \
  tests/unit/checkpoint/test_pickles.py tests/unit/checkpoint/test_tensor_index.py tests/unit/checkpoint/test_torch_files.py \
  tests/unit/data/documents/test_hostile_files.py tests/unit/data/documents/test_documents.py tests/unit/data/test_digests.py \
  tests/unit/data/prepared/test_plugin_tokenizers.py \
  tests/unit/launch/test_sharing.py \
  tests/unit/checkpoints_tools/huggingface/test_hf_files.py tests/unit/checkpoints_tools/huggingface/test_image_bounds.py \
  tests/unit/checkpoints_tools/test_ckpt.py tests/distributed/test_damage.py tests/end_to_end/test_data_check.py \
  tests/end_to_end/test_plugins.py tests/end_to_end/test_secrets.py
security: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "exhaustive or not exhaustive" $(SECURITY)

# The suite kills 3 times.
KILLS := 200
soak: $(STAMP)
	MMSCALE_KILLS=$(KILLS) $(BIN)/python -m pytest -q -s -W ignore tests/end_to_end/test_kills.py -k random

# The suite has five events. Each takes about five seconds on two cores; the seed is printed.
EVENTS ?= 50
SEED ?= $(shell date +%s)
chaos: $(STAMP)
	MMSCALE_CHAOS=$(EVENTS) MMSCALE_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -q -W ignore tests/end_to_end/test_chaos.py

# `make test-long` preempts once, at a fixed step; `make test-all` twice at random. Each preemption takes about twenty seconds.
preempted: $(STAMP)
	MMSCALE_PREEMPTIONS=20 $(BIN)/python -m pytest -q -s -W ignore -m exhaustive tests/slurm/test_preemptions.py

# Compares with an undisturbed quickstart; the suite does the same with a tiny model.
killed: quickstart
	MMSCALE_QUICKSTART=$(CURDIR)/$(RUN) $(BIN)/python -m pytest -q -s tests/end_to_end/test_quickstart.py -k make

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

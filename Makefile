# Everything runs inside .venv, which the first target makes. `make demo` and `make test` need no GPU, and
# after the installation no network.

.DEFAULT_GOAL := help
.PHONY: help demo evidence test test-cpu test-all test-lowest test-newest site serve audit weights weights-joint lint clean
.DELETE_ON_ERROR:

SHELL := bash

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# DeepSpeed's compiled parts are not needed, and take a compiler
export DS_BUILD_OPS := 0

BIN := .venv/bin
# what users install, and what tests take beside it
STAMP := .venv/.installed
TESTS := .venv/.installed-for-tests
JOBS ?= 2
# a file's tests share fixtures; the order is that of tests/conftest.py, longest files first
SPREAD := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
# what computes; the rest of the tests does not depend on the processor
CPU_TESTS ?= tests/families tests/invariants tests/teachers tests/unit
# of these, what compares no computed numbers; tests/test_layout.py checks that
CPU_LEFT_OUT := \
  tests/invariants/test_refused_samples.py tests/invariants/test_run_files.py \
  tests/unit/data/test_about.py tests/unit/data/test_examples.py tests/unit/data/test_images.py \
  tests/unit/data/test_reading.py tests/unit/data/test_reading_fuzz.py tests/unit/data/test_replay.py \
  tests/unit/data/test_samples.py \
  tests/unit/students/test_chat_processor.py tests/unit/students/test_locate.py \
  tests/unit/students/test_nothing_else_knows_families.py \
  tests/unit/teachers/test_flickr30k_entities.py tests/unit/teachers/test_summary.py \
  tests/unit/test_config.py tests/unit/test_model_files.py tests/unit/test_odd_texts.py tests/unit/test_words.py \
  tests/unit/training/test_arguments.py tests/unit/training/test_resuming.py tests/unit/training/test_settings.py \
  tests/unit/training/test_yaml_files.py \
  tests/unit/world/test_hands.py tests/unit/world/test_tokenizer.py
# of these, with a second thread too
THREADED_TESTS ?= tests/teachers
# of each part of the library some, for `make test-lowest` and `make test-newest`
VERSION_TESTS ?= tests/test_public_api.py tests/test_readme.py tests/unit/test_config.py tests/unit/data/test_store.py \
  tests/families/test_mllama.py tests/families/test_llava.py tests/invariants/test_trainer.py tests/invariants/test_export.py
# a virtual environment of its own; with UV_TORCH_BACKEND=cpu uv takes the CPU build of torch
define test_versions
$(PYTHON) -m venv .venv-$(1)
.venv-$(1)/bin/python -m pip install --disable-pip-version-check --quiet uv
.venv-$(1)/bin/uv pip install --python .venv-$(1)/bin/python --upgrade --resolution $(2) \
  -e '.[demo]' 'packaging>=25' 'pytest>=9,<10' 'pytest-timeout>=2.4' 'pytest-xdist>=3.8'
.venv-$(1)/bin/pytest -W ignore::DeprecationWarning $(VERSION_TESTS)
endef
PYTHON ?= python3
AVX2 := OMP_WAIT_POLICY=PASSIVE ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

# what only the training of the weights takes: drawings, from npm packages
DRAWINGS := weights-work/drawings
HANDS := noto@1.2.9 noto-v1@1.2.5 fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6 emojione@1.2.3 fxemoji@1.2.2 \
  streamline-emojis@1.2.4

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

demo: $(STAMP) ## the first run: lavender-demo/report.html and results.json
	$(BIN)/lavender demo

test: lint ## style, types, import rules and the tests that are not slow
	$(BIN)/pytest $(SPREAD)

test-cpu: $(TESTS) ## the tests that compute, once more as on an older processor (AVX2): with one thread, and with two
	OMP_NUM_THREADS=1 $(AVX2) $(BIN)/pytest $(SPREAD) $(CPU_TESTS) \
	  $(addprefix --ignore=,$(CPU_LEFT_OUT))
	OMP_NUM_THREADS=2 $(AVX2) $(BIN)/pytest $(SPREAD) $(THREADED_TESTS)

test-all: $(TESTS) ## the slow tests: several processes, a browser, the built wheel, the demo
	$(BIN)/pytest $(SPREAD) -m slow --durations 40

test-lowest: ## a few tests with the lowest versions that pyproject.toml allows, in .venv-lowest; needs the network
	$(call test_versions,lowest,lowest-direct)

test-newest: ## the same with the newest versions that it allows, in .venv-newest; needs the network
	$(call test_versions,newest,highest)

site: $(TESTS) ## the documentation as a site that opens from disk: build/site/index.html
	$(BIN)/python docs/lay_out.py
	$(BIN)/zensical build --strict --clean

serve: $(TESTS) ## the same on http://localhost:8000; run it again after a change of a page
	$(BIN)/python docs/lay_out.py
	$(BIN)/zensical serve

lint: $(TESTS) ## style, types and import rules only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check
	$(BIN)/lint-imports --no-logo

audit: $(TESTS) ## known advisories of the pinned versions; needs the network, and says so without it
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt pip-audit \
	  || { echo "audit: pip-audit could not be installed: this needs the network" >&2; exit 1; }
	@$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
	  || { echo "audit: an advisory above, or the database (pypi.org) is out of reach" >&2; exit 1; }

evidence: $(STAMP) ## the studies behind the README's tables (hours on two cores; a stopped study continues)
	$(BIN)/lavender study new-words
	$(BIN)/lavender study attributes
	$(BIN)/lavender study main

weights: $(STAMP) $(DRAWINGS) ## train the weights of the built-in world anew (hours on a CPU; needs npm)
	LAVENDER_HANDS=$(DRAWINGS) $(BIN)/python -m lavender.world.training.make all --out src/lavender/world/weights

weights-joint: $(STAMP) $(DRAWINGS) ## train a teacher with joint attention for the world (an hour or two on a CPU; not shipped)
	LAVENDER_HANDS=$(DRAWINGS) $(BIN)/python -m lavender.world.training.make joint_teacher --out weights-work

$(DRAWINGS): $(STAMP)
	mkdir -p weights-work/packages
	for package in $(HANDS); do \
	  folder=weights-work/packages/$${package%@*}; mkdir -p $$folder; \
	  packed=$$(npm pack --silent --pack-destination weights-work/packages @iconify-json/$$package) || exit; \
	  tar -xzf weights-work/packages/$$packed -C $$folder --strip-components 1 || exit; \
	done
	$(BIN)/python -m pip install --disable-pip-version-check --quiet resvg-py==0.5.0
	$(BIN)/python -m lavender.world.hands --packages weights-work/packages --out $@.partial
	mv $@.partial $@

clean: ## remove what the other targets made, except .venv and the weights
	rm -rf build dist lavender-demo .pytest_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): extras := demo
$(TESTS): extras := demo,dev,docs,data,deepspeed,eval,quantization,ray
# asks for fifty packages, torchvision among them, that its evaluator does not import; the extra `eval` has those it does
$(TESTS): without_dependencies := lmms_eval
$(STAMP) $(TESTS): pyproject.toml constraints.txt
	@found=; \
	for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Got no Python 3.11 or newer. Expected python3.11 or python3 on PATH. Do this: install Python 3.11." >&2; \
	  exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "Making .venv with $$found"; $$found -m venv .venv; fi
	@echo "Installing lavender-vlm and its pinned dependencies into .venv (some minutes, about 1.5 GB)"
	@set -o pipefail; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(extras)]' \
	  | grep --line-buffered -E '^(Collecting|Installing|Successfully)'
	@$(if $(without_dependencies),$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
	  --no-deps $(without_dependencies))
	@touch $@

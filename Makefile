# make train | test | test-long | test-hf | test-onnx | lint | docs | bench | bench-long | evidence | release-check: each makes the
# environment that it needs, once, from constraints.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= rmt
ARGS ?=

.PHONY: train test test-long test-hf test-onnx lint docs bench bench-long evidence release-check clean
.DEFAULT_GOAL := test

train: $(VENV)/ready
	$(BIN)/python train_enwik8.py --model $(MODEL) $(ARGS)

# one thread a test process: the models are tiny, and two processes use two cores better
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

# what needs ONNX, in an environment of its own
test-onnx: .venv-onnx/ready
	OMP_NUM_THREADS=1 .venv-onnx/bin/python -m pytest tests/test_onnx.py $(ARGS)

# the oldest and the newest supported transformers, with lm_eval
test-hf: .venv-hf-oldest/ready .venv-hf-newest/ready
	for each in oldest newest; do LONG_TESTS=1 OMP_NUM_THREADS=1 \
	  .venv-hf-$$each/bin/python -m pytest -n auto tests/test_huggingface*.py $(ARGS) || exit 1; \
	done

# the same, and what takes longer: more of the cases that `make test` checks, four processes where two are enough, kills
test-long: $(VENV)/ready
	LONG_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in site/: numbers and drawings are made again, notebooks are run, and whatever mkdocs warns of is an error
docs: .venv-docs/ready
	.venv-docs/bin/python docs/measured.py
	.venv-docs/bin/python docs/drawings.py
	.venv-docs/bin/python docs/run_notebooks.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	.venv-docs/bin/python docs/check_site.py site

# what users would get: built, checked, and each installed into an environment that holds nothing else
release-check: .venv-release/ready
	rm -rf dist build
	.venv-release/bin/python -m build --no-isolation
	.venv-release/bin/python -m twine check --strict dist/*
	for each in dist/*.whl dist/*.tar.gz; do \
	  rm -rf .venv-installed && $(PYTHON) -m venv .venv-installed && \
	  .venv-installed/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $$each && \
	  .venv-installed/bin/python tests/try_installed.py || exit 1; \
	done
	rm -rf .venv-installed

# every table and plot of speed, in half an hour, and what takes hours more; with ARGS=--quick, whether each of them runs,
# in a minute each
BENCHMARKS := gradient_reach rmt_training infini_training infini_million scan vocabulary full_attention generation
LONG_BENCHMARKS := compiled_training million_evaluation
bench: $(VENV)/ready .venv-peer/ready
	for each in $(BENCHMARKS) $(if $(ARGS),$(LONG_BENCHMARKS)); do \
	  echo "== $$each"; $(BIN)/python -m benchmarks.$$each $(ARGS) || exit 1; \
	done

bench-long: $(VENV)/ready .venv-peer/ready
	for each in $(LONG_BENCHMARKS) 'generation --curves' 'full_attention --long'; do \
	  echo "== $$each"; $(BIN)/python -m benchmarks.$$each || exit 1; \
	done

evidence: $(VENV)/ready
	$(BIN)/python -m benchmarks.evidence --report
	$(BIN)/python docs/measured.py

clean:
	rm -rf $(VENV) .venv-peer .venv-onnx .venv-hf-oldest .venv-hf-newest .venv-docs .venv-release .venv-installed build dist site *.egg-info

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	  { echo 'setting up $(VENV) failed: the packages of pyproject.toml, extra dev, in the versions of constraints.txt, are needed from an index or from PIP_FIND_LINKS' >&2; exit 1; }
	touch $@

.venv-onnx/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,onnx]'
	touch $@

.venv-docs/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

.venv-release/ready: constraints.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt build twine setuptools
	touch $@

.venv-hf-oldest/ready: TRANSFORMERS = 4.57.1
.venv-hf-newest/ready: TRANSFORMERS = $(shell sed -n 's/^transformers==//p' constraints.txt)
.venv-hf-oldest/ready .venv-hf-newest/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	sed '/^transformers==/d;/^huggingface[-_]hub==/d' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c $(@D)/constraints.txt -e '.[test,eval]' \
	  transformers==$(TRANSFORMERS)
	touch $@

# the published packages have our import names: they live in an environment of their own, for comparison only
.venv-peer/ready: constraints.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy packaging \
	  recurrent-memory-transformer-pytorch==0.7.0 infini-transformer-pytorch==0.2.1
	touch $@

# make demo, make test: on a fresh machine they make .venv first; after that they start at once.
#
#   PYTHON=python3.12   the Python to make .venv with (3.11 or newer)
#   JOBS=2              how many processes the tests run in
#   ARGS="-k machine"   more for pytest, or for the benchmarks

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
JOBS ?= 2
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
# One thread a process: the tests already run side by side.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

.PHONY: help install demo test test-all test-bare test-versions test-peers lint lint-workflows doctor dist bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      a first look at what foldkernels does on this machine"
	@echo "make test      the tests (make test-all: the slow ones too)"
	@echo "make test-bare the tests, in an environment without any optional package"
	@echo "make test-versions   the quick tests, with the oldest and the newest torch on each Python here; downloads GB"
	@echo "make test-peers   fair-esm and boltz, from the package index, beside their accelerated copies"
	@echo "make lint      ruff and mypy"
	@echo "make lint-workflows   .github and CITATION.cff, by zizmor, yamllint and check-jsonschema"
	@echo "make doctor    what this machine has, and what is missing"
	@echo "make dist      the sdist and the wheel, into dist/, checked for the package index"
	@echo "make bench     the benchmarks"
	@echo "make docs      the pages in docs/ as a site, into site/"
	@echo "make clean     remove what was built; .venv stays"

install: $(INSTALLED)

# torch first: what is installed after it then takes it as it is, and no package's build picks another.
$(INSTALLED): setup.py pyproject.toml constraints.txt | $(PY)
	$(PIP) torch
	$(PIP) setuptools
	$(PIP) -e '.[test,plots]'
	@touch $@

$(PY):
	@test -n "$(PYTHON)" || { echo "foldkernels needs Python 3.11 or newer, with venv and ensurepip (on Debian: apt-get" \
		"install python3-venv); none was found. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "foldkernels needs Python 3.11 or" \
		"newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

demo: $(INSTALLED)
	$(PY) examples/demo.py $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) --slow $(ARGS)

# In a virtual environment of links into .venv: what `pip install .` alone brings, and the tests' tools.
test-bare: $(INSTALLED)
	$(PYTEST) --bare $(ARGS)

# Environments of 5 GB, one at a time, made in .versions and deleted; ARGS="--python 3.12 --torch oldest" makes one.
test-versions: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) tests/support/versions.py --jobs $(JOBS) $(ARGS)

# Other projects' own code, which `make test` never needs: into a folder beside .venv, without what they depend on.
test-peers: $(INSTALLED)
	$(PY) -m pip --disable-pip-version-check install --quiet --upgrade --target .peers --no-deps -r tests/peers/requirements.txt
	rm -rf .peers/benchmarks # fairscale's, which would hide ours
	PYTHONPATH=.peers OMP_NUM_THREADS=1 $(PY) -m pytest tests/peers $(ARGS)

lint: $(INSTALLED)
	$(PY) -m pytest -q tests/repo/test_style.py

# Needs no .venv: the linters depend on nothing of ours. zizmor is offline: a new version's hash is looked up by hand.
TOOLS := .tools
SCHEMA = $(TOOLS)/bin/check-jsonschema --builtin-schema
lint-workflows: $(PY)
	$(PY) -m pip --disable-pip-version-check install --quiet --upgrade --target $(TOOLS) -r .github/requirements.txt
	$(TOOLS)/bin/zizmor --offline --no-progress --persona=pedantic .github/workflows
	PYTHONPATH=$(TOOLS) $(TOOLS)/bin/yamllint --strict -c .github/yamllint.yml .github CITATION.cff
	PYTHONPATH=$(TOOLS) $(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	PYTHONPATH=$(TOOLS) $(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	PYTHONPATH=$(TOOLS) $(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	PYTHONPATH=$(TOOLS) $(SCHEMA) vendor.citation-file-format CITATION.cff

doctor: $(INSTALLED)
	$(VENV)/bin/foldkernels doctor $(ARGS)

dist: $(INSTALLED)
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) -m twine check --strict dist/*

bench: $(INSTALLED)
	$(PY) -m benchmarks.studies.multiflow_cpu $(ARGS)

# The pages that are written from the code first, so that the site is of this checkout.
docs: $(INSTALLED)
	for page in docs/write_*.py; do $(PY) $$page || exit; done
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .peers .versions .tools build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

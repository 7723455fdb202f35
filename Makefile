# Works on a fresh clone with Python 3.10-3.12, make and git; the rest comes from PyPI.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup model lint format test check serve lock clean

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
UV_PIP := $(UV) --no-python-downloads --system-certs pip

# PYTHON=... chooses the interpreter; otherwise the first suitable one on the PATH.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
	2>/dev/null && echo $$p && break; done)

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

setup: $(STAMP) ## Create .venv with SGLang and this package

$(UV):
	@[ -n "$(PYTHON)" ] || { \
		echo "error: Python 3.10, 3.11 or 3.12 is needed (make PYTHON=...)" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install" \
			"the package python3-venv" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# pip may be set up for an index or a certificate that uv does not know of.
$(STAMP): requirements.lock pyproject.toml | $(UV)
	$(UV_PIP) install --python $(PY) --require-hashes -r requirements.lock || { \
		echo "uv failed (see above); installing with pip, this takes minutes" >&2; \
		$(PY) -m pip install --quiet --require-hashes -r requirements.lock; }
	$(UV_PIP) install --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

model: $(STAMP) ## Fetch the small model that tests and `make serve` use
	@$(PY) -m sglang_kvc.tools.fetch_model

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Two processes: the interpreter must be chosen before Triton is imported, and SGLang's
# own Triton kernels must not run in it. torch.compile would build C++ for minutes.
test: export HF_HUB_OFFLINE := 1
test: export TOKENIZERS_PARALLELISM := false
test: export TORCHDYNAMO_DISABLE := 1
test: model ## All tests that need no GPU
	@status=0; \
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels || status=1; \
	$(PY) -m pytest --ignore=tests/kernels || status=1; \
	exit $$status

check: lint ## lint and test, as CI does
	@$(MAKE) --no-print-directory test

serve: $(STAMP) ## Serve MODEL=folder (default: a small one); ARGS=... go to SGLang
	@$(PY) -m sglang_kvc.tools.serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# Hashes but no index address: whichever index is configured serves the same files.
# Pinned versions stay unless UPGRADE=--upgrade is given.
lock: $(UV) ## Rewrite requirements.lock from pyproject.toml
	$(UV_PIP) compile pyproject.toml --extra test --extra dev --universal \
		--python-version 3.10 --generate-hashes --no-annotate --no-emit-index-url \
		--custom-compile-command "make lock" $(UPGRADE) --quiet -o requirements.lock

clean: ## Remove what was built, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Works on a fresh clone with Python 3.10-3.12, make and git; the rest comes from PyPI.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup model lint format test check serve lock clean

# PYTHON=... chooses the interpreter; otherwise the first suitable one on the PATH, and
# 3.10 only if there is no later one.
ifndef PYTHON
PYTHON := $(shell for least in 11 10; do \
	for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c "import sys; sys.exit(not (3, $$least) <= sys.version_info < (3, 13))" \
	2>/dev/null && echo $$p && exit; done; done)
endif

# SGLANG=... chooses the release. Each has its lock file and its environment.
NEWEST := 0.5.23
OLDEST := 0.5.17
IS_310 := $(shell $(PYTHON) -c 'import sys; print(sys.version_info < (3, 11) or "")' \
	2>/dev/null)
ifndef SGLANG
ifneq ($(IS_310),)
SGLANG := $(OLDEST)
$(info SGLang $(NEWEST) needs Python 3.11 or 3.12; $(PYTHON) is 3.10 and gets $(OLDEST).)
else
SGLANG := $(NEWEST)
endif
endif
LOCKED := $(patsubst requirements-%.lock,%,$(wildcard requirements-*.lock))
LOCK := requirements-$(SGLANG).lock
VENV := .venv$(if $(filter-out $(NEWEST),$(SGLANG)),-$(SGLANG))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
UV_PIP := $(UV) --no-python-downloads --system-certs pip

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10
	@echo "SGLANG=$(OLDEST) after any of them uses the oldest release (default: $(NEWEST))"

setup: $(STAMP) ## Create the environment: SGLang and this package

$(UV):
	@[ -z "$(IS_310)" -o "$(SGLANG)" = "$(OLDEST)" ] || { \
		echo "error: SGLang $(SGLANG) needs Python 3.11 or 3.12, $(PYTHON) is 3.10:" \
			"make PYTHON=python3.11, or make SGLANG=$(OLDEST)" >&2; exit 1; }
	@[ -n "$(PYTHON)" ] || { \
		echo "error: Python 3.10, 3.11 or 3.12 is needed (make PYTHON=...)" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install" \
			"the package python3-venv" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# pip may be set up for an index or a certificate that uv does not know of.
requirements-%.lock:
	@echo "error: no lock file for SGLang $*; there are" \
		$(LOCKED) "(make SGLANG=..., or make SGLANG=$* lock)" >&2; exit 1

$(STAMP): $(LOCK) pyproject.toml | $(UV)
	$(UV_PIP) install --python $(PY) --require-hashes -r $(LOCK) || { \
		echo "uv failed (see above); installing with pip, this takes minutes" >&2; \
		$(PY) -m pip install --quiet --require-hashes -r $(LOCK); }
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

# torch.compile would build C++ for minutes. Small models decode faster with one thread,
# on a busy machine ten times.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: export TORCHDYNAMO_DISABLE := 1
test: model ## All tests that need no GPU; TESTS=... only those files, without kernels
	@$(PY) -m tests.lanes $(TESTS)

check: lint ## lint and test, as CI does
	@$(MAKE) --no-print-directory test

serve: $(STAMP) ## Serve MODEL=folder (default: a small one); ARGS=... go to SGLang
	@$(PY) -m sglang_kvc.tools.serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# Hashes but no index address: whichever index is configured serves the same files.
# Pinned versions stay unless UPGRADE=--upgrade is given. A release that is new here has
# no lock file yet: make SGLANG=VERSION lock.
lock: $(UV) ## Rewrite the lock file of SGLANG from pyproject.toml
	echo "sglang==$(SGLANG)" | $(UV_PIP) compile pyproject.toml - --extra test \
		--extra dev --universal --generate-hashes --no-annotate --no-emit-index-url \
		--python-version 3.1$(if $(filter $(OLDEST),$(SGLANG)),0,1) \
		--custom-compile-command "make SGLANG=$(SGLANG) lock" $(UPGRADE) --quiet \
		-o $(LOCK)

clean: ## Remove what was built, environments included
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

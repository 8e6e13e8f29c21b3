# `make book` and `make test` need only Python 3.11 or newer with pip: they create .venv themselves.
#   make book PYTHON=/path/to/python3   uses that Python
#   make book VENV=/path/to/environment puts the environment elsewhere

VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.minigen-installed
# What to say if something is missing.
NEED_PYTHON = minigen needs Python 3.11 or newer: install it (for example "apt install python3 python3-venv" or "brew install python@3.13") or name one with "make PYTHON=/path/to/python3".
NEED_VENV = This Python cannot make an environment with pip in it: install its venv and pip modules (for example "apt install python3-venv python3-pip") and run make again.

.PHONY: help book test export lint serve lab clean
.DEFAULT_GOAL := help

help:
	@echo "make book     run the chapters and build the book into _build/html"
	@echo "make test     check everything; PARTS=\"unit book\" runs only those (lint unit notebooks book browser gpu)"
	@echo "make export   write minigen/*.py from the notebooks and take the notebooks' outputs away"
	@echo "make lint     ruff and deno over package, notebooks, tests and the page that draws"
	@echo "make serve    show the built book at http://localhost:8000"
	@echo "make lab      open the notebooks in JupyterLab, with their live controls"
	@echo "make clean    remove what was built; .venv stays"

book: $(STAMP)
	@$(PY) book/build.py

test: $(STAMP)
	@$(PY) tests/run.py $(PARTS)

export: $(STAMP)
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && echo "minigen/ now holds what the notebooks export."

lint: $(STAMP)
	@$(PY) tests/run.py lint

serve: book
	@echo "The book is at http://localhost:8000 (Ctrl-C ends this)."
	@$(PY) -m http.server 8000 --bind 127.0.0.1 --directory _build/html

lab: $(STAMP)
	@$(PY) -c "import jupyterlab" 2>/dev/null || $(PY) -m pip install -q "jupyterlab>=4,<5"
	@$(PY) -m jupyterlab nbs

clean:
	rm -rf _build build minigen_book.egg-info .pytest_cache .ruff_cache
	find minigen nbs tests book -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: created once, and updated when one of these two files changes.
$(STAMP): requirements.txt pyproject.toml
	@if [ ! -x "$(PY)" ] || ! "$(PY)" -c "" 2>/dev/null; then \
	  found=""; \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python); do \
	    if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then printf '%s\n' '$(NEED_PYTHON)' >&2; exit 1; fi; \
	  echo "Making $(VENV) with $$("$$found" --version)."; \
	  if ! "$$found" -c "import venv, ensurepip" 2>/dev/null || ! "$$found" -m venv --clear "$(VENV)"; then \
	    rm -rf "$(VENV)"; printf '%s\n' '$(NEED_VENV)' >&2; exit 1; \
	  fi; \
	fi
	@echo "Installing what requirements.txt names (on a new machine some gigabytes, mostly torch: a few minutes)."
	@$(PY) -m pip install $$(test -t 1 || echo -qq) --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch "$@"

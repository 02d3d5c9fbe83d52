# make demo | test | test-slow | docs | quality | style | clean. Each does the set-up it needs, once, in .venv.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo test test-slow docs quality style clean
help:
	@echo "make demo       train, fold, compare: detectors, UNets and a ViT on embedded data (about 15 minutes after set-up)"
	@echo "make test       lint, types, layers and the fast tests"
	@echo "make test-slow  the rest of the tests"
	@echo "make docs       docs/ as a site, in work_dirs/site"
	@echo "make quality    ruff, mypy and the layers of imports; make style: let ruff rewrite"
	@echo "make setup      only the environment, in $(VENV); make clean: remove it and what was produced"

$(READY): pyproject.toml constraints.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py $(VENV)

setup: $(READY)

demo: $(READY)
	$(PY) tools/demo.py

quality: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

style: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: quality
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --dist worksteal -m "not slow"

test-slow: $(READY)
	$(PY) -m pytest -m slow

# Strict: a dead link or a page outside of the navigation is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict
	@echo "work_dirs/site/index.html; with search: $(PY) -m http.server -d work_dirs/site"

$(VENV)/.docs: $(READY)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache work_dirs

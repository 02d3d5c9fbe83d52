# make demo | test | test-slow | docs | quality | style | clean. Each does the set-up that it needs, once, in .venv.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := @$(PYTHON) tools/setup_env.py $(VENV)
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo test test-slow docs quality style clean
help:
	@echo "make demo       train, fold, compare: UNets, a ViT and detectors on embedded data"
	@echo "                PART=diffusion, far or detection: only this one, and only the set-up that it needs"
	@echo "make test       lint, types, layers and the fast tests"
	@echo "make test-slow  the rest of the tests"
	@echo "make docs       docs/ as a site, in work_dirs/site"
	@echo "make quality    ruff, mypy and the layers of imports; make style: let ruff rewrite"
	@echo "make setup      only the environment, in $(VENV); make clean: remove it and what was produced"

setup:
	$(RUN) setup $(PART)

demo:
	$(RUN) demo $(PART)

test:
	$(RUN) test

quality:
	$(RUN) quality

docs:
	$(RUN) docs
	@echo "work_dirs/site/index.html; with search: $(PY) -m http.server -d work_dirs/site"

test-slow: setup
	$(PY) -m pytest -m slow

style:
	$(RUN) setup dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache work_dirs

# Everything runs in .venv, which the first target that needs it creates. Needs Python 3.11 or newer (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSIGHTFACE := insightface==2.1
MINUTES ?= 45

# Two threads, and none that spins while it waits: contending processes are three times faster so.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo serve check test prove mini clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## the environment in .venv, as requirements.lock says

# The stamp is older than the lock exactly when the lock has changed since the last install.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(INSIGHTFACE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: export HF_HUB_OFFLINE := 1
demo: install ## one character in four scenes, drawn here: pictures, contact sheet and scores in out/demo
	$(BIN)/likeness demo --out out/demo

serve: export HF_HUB_OFFLINE := 1
serve: install ## the server on this machine, at http://127.0.0.1:8000/docs
	$(BIN)/likeness serve

check: install ## format, lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: export HF_HUB_OFFLINE := 1
test: check ## check, then every test that needs neither a GPU nor patience
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not gpu and not slow"

prove: export HF_HUB_OFFLINE := 1
prove: check ## the full bars: every test without a GPU, the benchmarks (docs/main_job.md), the evaluation (models/mini/CARD.md)
	LIKENESS_CHAOS_ROUNDS=5 $(BIN)/python -m pytest -m "not gpu"
	$(BIN)/python benchmarks/serve_overhead.py --write docs/serve_overhead.md
	$(BIN)/python benchmarks/main_job.py --write docs/main_job.md
	$(BIN)/python -m benchmarks.job_overhead --write docs/job_overhead.md
	$(BIN)/python -m benchmarks.job_races --write docs/job_races.md
	$(BIN)/python -m benchmarks.overload --write docs/overload.md
	rm -rf out/character_proof
	$(BIN)/python -m benchmarks.character_proof --write docs/character_proof.md
	$(BIN)/python -m training.mini.evaluate

mini: install ## train the embedded models anew (one GPU, MINUTES=45), pin and measure them
	$(BIN)/python -m training.mini.train --minutes $(MINUTES) --out models/mini --overwrite
	$(BIN)/python -m training.mini.pack
	$(BIN)/python -m training.mini.evaluate

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find deployments training tests -name __pycache__ -type d -prune -exec rm -rf {} +

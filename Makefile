# make report [PROFILE=name] [ARGS="-p key=value …"]   run a profile's notebooks and write reports/PROFILE/index.html
# make test [ARGS="-m 'not slow'"]                     the tests, minutes; with these ARGS in one minute
# make lint                                            formatting, rules and types: ruff and mypy
# make check                                           lint and every test: what CI runs
# make lab                                             JupyterLab on the notebooks
# make demo                                           the photos that the demo profile needs (report, lab, test make them too)
# make lock                                            new versions for requirements.lock
# make clean                                           remove .venv and what the demo profile produced
# Needs Python 3.11 or newer, make and git. PYTHON=python3.12 chooses the interpreter that .venv is made with.
PYTHON ?= python3
PROFILE ?= demo
TORCH ?= 2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help report test lint check lab lock clean

help:
	@sed -n '1,8s/^# //p' Makefile

report: $(INSTALLED)
	@$(BIN)/catlib report $(PROFILE) $(ARGS)

# The files of tests are shared out among processes, one a core, four at most. Another -m among the ARGS takes the place of this one.
TESTS := -m pytest -n logical --maxprocesses 4 --dist loadfile
test: $(INSTALLED)
	@$(BIN)/python $(TESTS) -m "not long" $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

check: lint
	@$(BIN)/python $(TESTS) $(ARGS)

# In a clone, git is told to leave the notebooks' outputs out of what is committed (.git/info/attributes).
lab: $(INSTALLED)
	@! git rev-parse --git-dir >/dev/null 2>&1 || { $(BIN)/nbstripout --install && \
	  git config filter.nbstripout.clean '"$(CURDIR)/$(BIN)/python" -m nbstripout --keep-id' && \
	  git config filter.nbstripout.required false; }
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks $(ARGS)

# Written anew whenever the requirements are newer than the last complete installation.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing requirements.lock (one to two minutes)"
	@$(BIN)/python $(PIP) install --quiet -r requirements.lock
	@$(BIN)/python $(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock:
	@folder=$$(mktemp -d) && $(PYTHON) -m venv $$folder && \
	$$folder/bin/python $(PIP) install --quiet torch==$(TORCH) setuptools '.[lint,test]' && \
	{ echo "# Exact versions of catlib[lint,test]; written by make lock"; \
	  $$folder/bin/python $(PIP) freeze --all --exclude pip --exclude catlib | sed 's/+cpu$$//'; } > requirements.lock.new && \
	mv requirements.lock.new requirements.lock && rm -rf $$folder

# Nothing is drawn where the demo's photos are complete.
.PHONY: demo
report test check lab: demo
demo: $(INSTALLED)
	@$(BIN)/python -m demo

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache catlib.egg-info \
	  data/demo outputs/runs/demo outputs/vlm_checkpoints/demo reports/demo reports/index.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

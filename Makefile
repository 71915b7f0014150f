# `make demo` and `make test` need nothing but Python >= 3.11: each makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO ?= runs/demo
# The fast suite compiles thousands of tiny programs and runs each once or twice: less optimization and a cache of compiled
# programs, which subprocesses share, cut its time to less than half. `make slow` runs what users run.
FAST = JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1

.PHONY: demo test slow check format clean

demo: $(VENV)/.installed  ## retrofit SmolLM2-135M on real text, about 7 minutes on two CPU cores
	$(RUN) -m train.retrofit --set output=$(DEMO)

test: $(VENV)/.installed-test  ## the test suite, without the slow part
	$(RUN) -m ruff check .
	$(FAST) $(RUN) -m pytest -q -n 2 --dist worksteal -m "not slow"

slow: $(VENV)/.installed-test
	$(RUN) -m pytest -q -m slow

check: $(VENV)/.installed-dev  ## formatting, linting, types, tests
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyrefly check
	$(MAKE) test

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[test,dev]"
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache build *.egg-info

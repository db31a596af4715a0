# Everything happens in one environment, .venv, made here from pyproject.toml.
#   make lab         the course in JupyterLab          (make lab ARGS=--no-browser on a server; DEV=CL picks a device)
#   make test        everything: lint, tests on the CPU and on OpenCL, every notebook   (.ci/run calls this)
#   make test-fast   lint and the quick tests on the CPU, in at most three minutes
#   make demo        continues a Python prompt with the shipped model and prints its speed
#   make data        the shipped model in other formats, made from data/minillama-coder-Q8_0.gguf
#   make ladder      measures every rung on this machine; make results draws the README's figures from data/results
#   make clean       removes .venv and what tools left behind; your measurements stay

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.made
MASTER := data/minillama-coder-Q8_0.gguf
FORMATS := F16 Q4_0 Q4_K_M
MADE := $(FORMATS:%=data/minillama-coder-%.gguf)
MODEL ?= $(MASTER)
PROMPT ?= def fibonacci(n):
ARGS ?=
# Two processes at a time, files and notebooks kept whole; each lowers its kernels itself (PARALLEL=0), since tinygrad's
# helpers, started anew every 16 kernels, would only wait for the same two cores.
PYTEST := PARALLEL=0 python -m pytest -n 2 --dist loadscope
TESTS := $(PYTEST) --no-loadscope-reorder
NBVAL := $(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=500 \
    --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider --timeout=600 course
# The interpreter and its tools come from .venv, and so does clang where it was installed there.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: lab test test-fast demo data lint clean env ladder results
.DEFAULT_GOAL := help

help:
	@sed -n '2,8s/^#   //p' Makefile

env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "minillama needs Python 3.11 or newer; this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] or 0)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@python -m minillama.devices --ensure
	@touch $@

data: $(MADE)

$(MADE): data/minillama-coder-%.gguf: $(MASTER) | $(STAMP)
	@python -m minillama quantize $< $@ $*

lab: $(STAMP) $(MADE)
	@dev=$${DEV:-$$(python -m minillama.devices --best)} && echo "The course runs on DEV=$$dev." && \
	    DEV=$$dev python -m jupyterlab --notebook-dir=course $(ARGS)

demo: $(STAMP) $(MASTER)
	@dev=$${DEV:-$$(python -m minillama.devices --best)} && \
	    DEV=$$dev python -m minillama generate $(MODEL) -p "$(PROMPT)" -n 64 $(ARGS)

ladder: $(STAMP)
	@dev=$${DEV:-$$(python -m minillama.devices --best)} && DEV=$$dev python -m minillama ladder $(ARGS)

results: $(STAMP)
	DEV=CPU python -m minillama.report

lint: $(STAMP)
	ruff check .

test: $(STAMP) lint $(MADE)
	@python -m minillama.devices --works CL || echo "No OpenCL platform here: testing on the CPU only."
	DEV=CPU $(TESTS)
	DEV=CPU $(NBVAL)
	@if python -m minillama.devices --works CL; then set -x; DEV=CL $(TESTS) -m "not host" && DEV=CL $(NBVAL); fi

test-fast: $(STAMP) lint
	DEV=CPU $(TESTS) -m "not slow"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

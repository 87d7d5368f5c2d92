# Needs git, make and Python >= 3.11. `make demo` and `make test` are the two that matter; both do only what is missing.
VENV := .venv
BIN := $(VENV)/bin
TEST_EXTRAS := dev,notebooks,browser,tune,docs
TEST_READY := $(VENV)/.installed-$(TEST_EXTRAS)
# What the tests need holds all that the demo needs.
DEMO_READY := $(or $(wildcard $(TEST_READY)),$(VENV)/.installed-notebooks)
# The first Python that runs and is new enough, the one the constraints were tested on before newer ones;
# else python3, so that it can say what is wrong.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
FOUND = $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
PYTHON ?= $(or $(FOUND),python3)
# CI=true adds the slow tests.
SLOW := $(if $(filter true,$(CI)),-m "")
# Tests of numbers; kernels add in another order on every processor, and three kinds of them can be chosen on most.
NUMERIC := $(addprefix tests/,ablation activations analysis audit defences edits models training transport)
KERNELS := native avx2 sse41
KERNEL_TARGETS := $(addprefix test-kernel-,$(KERNELS))
KERNEL_avx2 := ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
KERNEL_sse41 := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41

# Idle OpenMP threads sleep: spinning, they would take the cores that other programs are working on.
export OMP_WAIT_POLICY := passive

.PHONY: help demo test test-kernels $(KERNEL_TARGETS) lab lint docs organism clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

demo:  ## run the notebooks on the model organism and write an offline HTML report
	@echo "Demo: installs replib into $(VENV) (2 to 6 minutes, once), runs the notebooks (about 8 minutes on 2 cores), writes runs/report.html."
	@$(MAKE) -s --no-print-directory $(DEMO_READY)
	@$(BIN)/replib demo

test:  ## run the tests
	@echo "Tests: installs replib into $(VENV) (2 to 6 minutes, once), runs pytest (under 8 minutes on 2 cores)."
	@$(MAKE) -s --no-print-directory $(TEST_READY)
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(SLOW)

test-kernels: $(KERNEL_TARGETS)  ## run the tests of numbers on three kinds of kernels

$(KERNEL_TARGETS): test-kernel-%: $(TEST_READY)
	@echo "Tests of numbers on the kernels: $*"
	@$(KERNEL_$*) $(BIN)/python -m pytest -q -n 2 --dist worksteal $(NUMERIC)

lab: $(DEMO_READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

lint: $(TEST_READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(TEST_READY)  ## draw the rooms and build the pages of docs/ into build/docs, without a network
	@$(BIN)/python tools/layout_picture.py
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "Pages, to open in any browser: build/docs/index.html"

organism: $(DEMO_READY)  ## train the model organism anew on the CPU, and measure it
	@$(BIN)/python -m replib.organism.build
	@$(BIN)/python -m replib.organism.card

clean:  ## remove results and caches; the environment stays
	@rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find replib tests notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=/path/to/it." >&2; exit 1; }
	@$(PYTHON) tools/install.py $(VENV) $*
	@touch $@

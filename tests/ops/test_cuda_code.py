"""The CUDA code, compiled for the CPU and run lane by lane, against the C++ code."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
EMULATION = Path(__file__).parent / "cuda_emulation"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitizers in compilers

pytestmark = [pytest.mark.processes, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")]


CHECKS = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a CPU would not mind
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", *CHECKS, "-I", EMULATION, "-I", KERNELS]
LIBRARY = ("algorithm", "cmath", "cstdint", "cstdlib", "limits", "random")
HEADERS = ["cuda_emulation.h", *(f"<{name}>" for name in LIBRARY)]

CHOSEN = 'inline const int mistake = std::getenv("MISTAKE") ? std::atoi(std::getenv("MISTAKE")) : -1;\n'
MISTAKES = [
    ("gae", "lane_of_thread() == count - 1 ? after : neighbour", "neighbour", "advantages"),
    ("kv_blocks", "run / columns % rows", "run % rows", "scattered"),
    ("kv_blocks", "16 | source.address", "16 | 0", "signal"),
    ("linear_logprob", "before <= group", "before < group", "statistics"),
    ("quantized_linear", "blockIdx.x / blocks_per_rows * rows", "0", "int8 products"),
    ("quantized_linear", "first_out + out >= outs", "first_out >= outs", "int8 products"),
    ("quantized_linear", "all_rows - first_row", "rows", "int4 products"),
    ("quantized_linear", "k % kUnit", "k / 2", "int4 products"),
    ("quantized_linear", "k < width - i", "k < width", "int4 products"),
    ("sampling", "one.token < than.token", "one.token > than.token", "tokens"),
    (
        "sampling",
        "sums->total * exp_nonpositive(sums->maximum - scaled)",
        "sums->total + exp_nonpositive(sums->maximum - scaled)",
        "log-probabilities",
    ),
    ("linear_logprob", "column == target", "column == targets[row]", "gradients"),
]
"""Of each kernel's CUDA code: an expression, what a mistake would have in its place, and where it shows."""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """What every source begins with, compiled once."""
    header = tmp_path_factory.mktemp("header") / "header.h"
    includes = "".join(f"#include {name if name[0] == '<' else json.dumps(name)}\n" for name in HEADERS)
    header.write_text(includes + CHOSEN)
    target = header.with_name("header.h.gch")  # which the compiler takes in its place
    subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", header, "-o", target], env=ENVIRONMENT, check=True)
    return header


def compiled(source: Path, target: Path, header: Path) -> Path:
    """An object file."""
    subprocess.run([COMPILER, *FLAGS, "-include", header, "-c", source, "-o", target], env=ENVIRONMENT, check=True)
    return target


def with_mistakes(kernel: str) -> str:
    """KERNEL.cu, which makes the mistake of a number only where the environment chooses it."""
    text = (KERNELS / "tensor" / f"{kernel}.cu").read_text()
    for number, (of_kernel, right, wrong, _) in enumerate(MISTAKES):
        if of_kernel == kernel:
            assert text.count(right) == 1
            text = text.replace(right, f"(mistake == {number} ? ({wrong}) : ({right}))")
    return text


@pytest.fixture(scope="module")
def program(tmp_path_factory, header):
    """By kernel, what compares KERNEL.cu with KERNEL.cc; compiled once, which takes longer than all comparisons."""
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def of_kernel(kernel: str) -> Path:
        source, target = folder / f"{kernel}.cu.cc", folder / kernel
        source.write_text(with_mistakes(kernel))
        sources = [source, EMULATION / f"{kernel}_differences.cc", KERNELS / "tensor" / f"{kernel}.cc"]
        objects = [compiled(one, folder / f"{one.stem}.o", header) for one in sources]
        subprocess.run([COMPILER, *objects, "-o", target], env=ENVIRONMENT, check=True)
        return target

    return of_kernel


def differences(program: Path, mistake: int = -1) -> list[str]:
    """What the CUDA code computes otherwise than the C++ code, where it makes a mistake of `MISTAKES`, or none."""
    environment = {**ENVIRONMENT, "MISTAKE": str(mistake)}
    process = subprocess.run([program], env=environment, stdout=subprocess.PIPE, text=True, timeout=600)
    if process.returncode < 0:
        return [f"ended by signal {-process.returncode}"]
    lines = process.stdout.splitlines()
    assert process.returncode == bool(lines)
    return lines


@pytest.mark.parametrize("kernel", ["gae", "kv_blocks", "linear_logprob", "quantized_linear", "sampling"])
def test_cuda_code_computes_what_the_c_plus_plus_code_does(kernel, program):
    assert differences(program(kernel)) == []


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: " for ".join(MISTAKES[number][2:0:-1]))
def test_a_mistake_in_the_cuda_code_shows(number, program):
    kernel, _, _, what = MISTAKES[number]
    assert any(what in line for line in differences(program(kernel), number))

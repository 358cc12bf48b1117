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
HEADERS = ["cuda_emulation.h", *(f"<{name}>" for name in ("algorithm", "cmath", "cstdint", "limits", "random"))]


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """What every source begins with, compiled once."""
    header = tmp_path_factory.mktemp("header") / "header.h"
    header.write_text("".join(f"#include {name if name[0] == '<' else json.dumps(name)}\n" for name in HEADERS))
    target = header.with_name("header.h.gch")  # which the compiler takes in its place
    subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", header, "-o", target], env=ENVIRONMENT, check=True)
    return header


def compiled(source: Path, target: Path, header: Path) -> Path:
    """An object file."""
    subprocess.run([COMPILER, *FLAGS, "-include", header, "-c", source, "-o", target], env=ENVIRONMENT, check=True)
    return target


@pytest.fixture(scope="module")
def others(tmp_path_factory, header):
    """Per kernel, once, what every text of its CUDA code is linked with: the comparison, and KERNEL.cc."""
    folder = tmp_path_factory.mktemp("objects")

    @cache
    def of_kernel(kernel: str) -> list[Path]:
        sources = [EMULATION / f"{kernel}_differences.cc", KERNELS / "tensor" / f"{kernel}.cc"]
        return [compiled(source, folder / f"{source.stem}.o", header) for source in sources]

    return of_kernel


def differences(source: str, others: list[Path], folder: Path, header: Path) -> list[str]:
    """What KERNEL.cu with this text computes otherwise than KERNEL.cc."""
    (folder / "cuda.cc").write_text(source)
    program = folder / "differences"
    objects = [compiled(folder / "cuda.cc", folder / "cuda.o", header), *others]
    subprocess.run([COMPILER, *objects, "-o", program], env=ENVIRONMENT, check=True)
    process = subprocess.run([program], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=120)
    if process.returncode < 0:
        return [f"ended by signal {-process.returncode}"]
    lines = process.stdout.splitlines()
    assert process.returncode == bool(lines)
    return lines


@pytest.mark.parametrize("kernel", ["gae", "kv_blocks", "linear_logprob", "sampling"])
def test_cuda_code_computes_what_the_c_plus_plus_code_does(kernel, others, tmp_path, header):
    assert differences((KERNELS / "tensor" / f"{kernel}.cu").read_text(), others(kernel), tmp_path, header) == []


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "what"),
    [
        ("gae", "lane_of_thread() == count - 1 ? after : neighbour", "neighbour", "advantages"),
        ("kv_blocks", "run / columns % rows", "run % rows", "scattered"),
        ("kv_blocks", "16 | source.address", "16 | 0", "signal"),
        ("linear_logprob", "before <= group", "before < group", "statistics"),
        ("sampling", "one.token < than.token", "one.token > than.token", "tokens"),
        ("sampling", "sums->total * exp_nonpositive", "sums->total + exp_nonpositive", "log-probabilities"),
        ("linear_logprob", "column == target", "column == targets[row]", "gradients"),
    ],
)
def test_a_mistake_in_the_cuda_code_shows(kernel, right, wrong, what, others, tmp_path, header):
    source = (KERNELS / "tensor" / f"{kernel}.cu").read_text()
    assert source.count(right) == 1
    assert any(what in line for line in differences(source.replace(right, wrong), others(kernel), tmp_path, header))

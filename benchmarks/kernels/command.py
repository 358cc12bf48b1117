"""`fuse bench kernels`: each native kernel against torch, alternating in one process, and against the machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from fuse.benchmarks.kernels.cases import CASES, MakeCases
from fuse.benchmarks.kernels.rows import Rates, compare, format_row, measure_rates
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import Row, add_json_option, add_selection
from fuse.commands.options import add_numbers, check_counts
from fuse.commands.output import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench kernels`."""
    add_numbers(parser, repeats=(9, "timed calls of each implementation, a quarter as many where one takes seconds"))
    text = f"of {', '.join(CASES)} (default: all; linear_logprob takes minutes and 12 GB of memory)"
    add_selection(parser, "--kernels", list(CASES), text)
    add_json_option(parser, "machine and rows")


def run(arguments: argparse.Namespace) -> int:
    """Measure the kernels, print a line for each row, and write what there is to `arguments.json` after each kernel."""
    check_counts(arguments, "repeats")
    torch.set_num_threads(1)
    rates = measure_rates()
    machine = describe_machine() | {
        "copy_bytes_per_s": rates.copy_bytes_per_s,
        "product_flops_per_s": {str(dtype): rate for dtype, rate in rates.product_flops_per_s.items()},
    }
    rows = []
    for name in arguments.kernels:
        for make_cases in CASES[name]:
            for row in _measured(make_cases, arguments.repeats, rates):
                print(format_row(row), flush=True)
                rows.append(row)
            if arguments.json:
                write_json(arguments.json, {"machine": machine, "rows": rows})
    return 0


def _measured(make_cases: MakeCases, repeats: int, rates: Rates) -> Iterator[Row]:
    """Whose tensors are gone before the next ones are made."""
    for case in make_cases():
        yield from compare(case, repeats, rates)

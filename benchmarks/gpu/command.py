"""`fuse bench gpu`: what only a GPU can show, on one of them and without Ray. Exit status 1 if a check fails.

Kernels against references, packed sequences against padded ones, three PPO updates, sleep, weight sync between two
processes, decoding, training beside it, fused steps of two ranks, and the kernels under compute-sanitizer. With
--device cpu the same on tiny shapes. Needs torch, transformers and what these need.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fuse.commands.options import add_numbers, check_counts
from fuse.commands.output import output_file, write_json

if TYPE_CHECKING:
    from fuse.benchmarks.gpu.setup import Row

LIMITS_S: Mapping[str, float] = MappingProxyType(
    {
        "kernels": 60,
        "sleep": 60,
        "packing": 60,
        "weight_sync": 60,
        "fused_step": 90,
        "decode": 75,
        "sharing": 45,
        "updates": 180,
        "sanitizer": 150,
    }
)
"""Checks by the module that has them, in the order in which they run, and what each may take."""
_NEEDED: Mapping[str, tuple[int, int]] = MappingProxyType({"numpy": (2, 0), "torch": (2, 11), "transformers": (5, 16)})
_MARKS = {True: "ok", False: "FAILED", None: "skipped"}
_WIDTHS = (33, 18, 26, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench gpu`."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument(
        "--checks", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S), metavar="CHECK",
        help=f"of {', '.join(LIMITS_S)} (default: all)",
    )  # fmt: skip
    add_numbers(parser, limit_s=(420, "seconds that all may take together; what is left then fails"))
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write machine and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Run the checks one after the other, print a line for each row, and write what there is to `arguments.json`.

    Raises: ValueError where a package is missing or too old.
    """
    check_counts(arguments, "limit_s")
    _check_packages()
    from fuse.benchmarks.gpu import runner
    from fuse.benchmarks.gpu.setup import Row, setup_of

    deadline_s = time.monotonic() + arguments.limit_s
    setup = setup_of(arguments.device)
    rows: list[Row] = []
    (machine,) = runner.run("machine", runner.describe, setup, arguments.limit_s)
    if isinstance(machine, Row):
        raise ValueError(machine.detail)
    print(_line("check", "measured", "bound", "", "detail"), flush=True)
    for name in arguments.checks:
        check: Any = import_module(f"fuse.benchmarks.gpu.{name}").check
        limit_s = min(LIMITS_S[name], max(0.0, deadline_s - time.monotonic()))
        for row in runner.run(name, check, setup, limit_s):
            print(_line(row.name, row.measured, row.bound, _MARKS[row.ok], row.detail), flush=True)
            rows.append(row)
        if arguments.json:
            write_json(arguments.json, {"machine": machine, "rows": [_as_json(row) for row in rows]})
    num_failed = sum(row.ok is False for row in rows)
    print(f"{len(rows)} rows, {num_failed} failed, {sum(row.ok is None for row in rows)} skipped")
    return 1 if num_failed else 0


def _check_packages() -> None:
    for package, (major, minor) in _NEEDED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ValueError(f"{package} is not installed here: this needs {', '.join(_NEEDED)}") from None
        if tuple(map(int, found.split(".")[:2])) < (major, minor):
            raise ValueError(f"{package} is {found}: this needs {major}.{minor} or later")


def _line(*cells: str) -> str:
    *first, last = cells
    return " ".join([*(cell.ljust(width) for cell, width in zip(first, _WIDTHS, strict=True)), last]).rstrip()


def _as_json(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in ("name", "measured", "bound", "ok", "detail")}

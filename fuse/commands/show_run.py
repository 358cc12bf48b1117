"""What `fuse show` says and writes of a whole run, or of a made-up one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fuse.commands.run_text import update_text
from fuse.printable import printable
from fuse.run_page.data import read_details, read_run, run_data, trace_record
from fuse.run_page.demo import TITLE, write_demo
from fuse.run_page.page import page
from fuse.run_page.words import advice, alarms
from fuse.update_log import UpdateRecord

_SHOWN = 10
"""Updates that the terminal gets a line of."""


def show_run(console: Console, directory: Path) -> None:
    """Print alarms, advice and the latest updates.

    Raises:
        ValueError: the directory holds no run.
    """
    records, _ = read_run(directory)
    for text in alarms(records):
        console.print(printable(text), soft_wrap=True, markup=False)
    for text in advice(records):
        console.print(printable(text), soft_wrap=True, markup=False)
    console.print(_table(records[-_SHOWN:]))


def run_page(directory: Path) -> str:
    """The page of the run in an output directory. Raises: ValueError, it holds no run."""
    records, traces = read_run(directory)
    details = {update: read_details(path) for update, path in traces.items()}
    return page(run_data(records, directory.resolve().name, details), details)


def trace_page(title: str, trace: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The page of one update. Raises: ValueError, the trace is damaged."""
    record = trace_record(trace)
    return page(run_data([record], title, [record.update]), {record.update: details})


def demo_page() -> str:
    """The page of a run that nobody ran."""
    with tempfile.TemporaryDirectory(prefix="fuse-demo-") as directory:
        write_demo(Path(directory))
        records, traces = read_run(Path(directory))
        details = {update: read_details(path) for update, path in traces.items()}
    return page(run_data(records, TITLE, details), details)


def _table(records: Sequence[UpdateRecord]) -> Table:
    table = Table("update", Column("", overflow="fold"))
    for record in records:
        known = {"time/total": record.end_s - record.start_s, **record.metrics}
        is_told = {"objective/scores", "reward"} & known.keys()
        table.add_row(str(record.update), update_text(known) if is_told else f"{known['time/total']:.1f} s")
    return table

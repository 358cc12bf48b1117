"""What benchmarks print: rows as tables, by formats, and how far they are."""

from __future__ import annotations

import threading

import pytest
from rich.console import Console

from fuse.benchmarks.options import rows_table, telling


def test_a_cell_formats_the_fields_of_its_row() -> None:
    rows = [{"name": "[a]", "ms": 1.26, "side": {"share": 0.5}}, {"name": "b", "ms": 10.0, "side": {"share": 0.25}}]
    console = Console(record=True, width=60)
    console.print(rows_table(rows, {"setting": "{name}", "ms": "{ms:.1f}", "late": "{side[share]:.0%}"}, title="Steps"))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line for line in lines if len(line) == 3] == [
        ["setting", "ms", "late"],
        ["[a]", "1.3", "50%"],
        ["b", "10.0", "25%"],
    ]


def test_progress_is_told_until_the_body_ends(capsys: pytest.CaptureFixture[str]) -> None:
    told = threading.Event()

    def progress() -> str:
        told.set()
        return "some of it"

    with telling(progress, every_s=1e-3):
        assert told.wait(30)
    assert set(capsys.readouterr().err.splitlines()) == {"some of it"}
    assert "progress" not in {thread.name for thread in threading.enumerate()}

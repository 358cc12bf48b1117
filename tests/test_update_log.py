"""The log of updates: what a device did most in each part of the time, and files that are cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fuse.trace import PhaseClock, Span
from fuse.update_log import IDLE_LETTERS, NUM_CELLS, UpdateRecord, append, keep_until, read, record_of


def made(update: int = 1) -> UpdateRecord:
    clock = PhaseClock()
    clock.start_s, clock.end_s = 100.0, 100.0 + NUM_CELLS
    clock.spans = [Span("rollout", "phase", 100.0, 116.0)]
    tracks = {
        "device0": {
            "generation": [Span("decode", "generate", 100.0, 116.0), Span("sample 1", "sample", 100.0, 150.0)],
            "model": [Span("F a.0.0", "train", 132.0, 148.4), Span("step a", "optimizer", 148.4, 164.0)],
        }
    }
    return record_of(update, {"reward": 0.5}, tracks, clock)


def test_a_strip_shows_what_took_most_of_each_cell() -> None:
    record = made()
    assert record.strips == {"device0": "G" * 16 + IDLE_LETTERS["driver"] * 16 + "T" * 16 + "O" * 16}
    assert record.metrics == {"reward": 0.5}
    assert list(record.phases) == [("rollout", 0.0, 16.0)]


def test_what_is_written_is_read_and_forgotten_from_an_update_on(tmp_path: Path) -> None:
    path, record = tmp_path / "out" / "updates.jsonl", made()
    records = [replace(record, update=update) for update in (1, 2, 3)]
    keep_until(path, 0)
    for one in records:
        append(path, one)
    assert [one.update for one in read(path)] == [1, 2, 3]
    assert read(path)[0].strips == record.strips
    keep_until(path, 2)
    assert [one.update for one in read(path)] == [1, 2]
    keep_until(path, 0)
    assert read(path) == []


def test_a_line_that_a_full_disk_cut_off_is_left_out_and_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    append(path, made())
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(read(path)) == 1
    path.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(ValueError, match=r"updates.jsonl, line 1: not an update .*delete the line"):
        read(path)
    keep_until(path, 5)
    assert len(read(path)) == 1, "a run goes on, whatever is in the file"

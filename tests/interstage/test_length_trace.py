"""Recorded lengths are read as they are, and cut where a run would have cut them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.interstage.length_trace import read_trace


def test_a_trace_has_the_columns_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_id,prompt_tokens,output_tokens\na,7,100\nb,3,0\na,7,30\n")
    trace = read_trace(path, prompt_tokens=128)
    assert len(trace) == 3
    assert trace.prompt_tokens.tolist() == [7, 3, 7]
    assert trace.response_tokens.tolist() == [100, 1, 30], "no length is below one token"
    assert trace.prompts == ("a", "b", "a")


def test_prompts_that_were_not_recorded_are_alike(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("output_tokens\n5\n6\n")
    trace = read_trace(path, prompt_tokens=128)
    assert trace.prompt_tokens.tolist() == [128, 128]
    assert trace.prompts == (None, None)


def test_cut_responses_end_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("output_tokens\n5\n60\n")
    assert read_trace(path, 1).cut(20).response_tokens.tolist() == [5, 20]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        read_trace(path, 1).cut(0)

"""Traces of lengths: what a file gives, and the line that says what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.interstage.length_trace import read_length_trace


def trace(directory: Path, text: str) -> Path:
    path = directory / "lengths.csv"
    path.write_text(text)
    return path


def test_all_columns_are_read(tmp_path: Path) -> None:
    read = read_length_trace(
        trace(tmp_path, "prompt_id,prompt_tokens,output_tokens,model\na,7,3,x\nb,8,0,y\na,7,5,x\n")
    )
    assert read.prompt_tokens.tolist() == [7, 8, 7]
    assert read.response_tokens.tolist() == [3, 1, 5], "no response is empty"
    assert read.prompts == ("a", "b", "a")
    assert len(read) == 3
    assert read.cut(4).response_tokens.tolist() == [3, 1, 4]
    assert read.cut(4).prompts == read.prompts


def test_one_column_is_enough(tmp_path: Path) -> None:
    read = read_length_trace(trace(tmp_path, "output_tokens\n3\n4\n"), prompt_tokens=9)
    assert read.prompt_tokens.tolist() == [9, 9]
    assert read.prompts == (None, None)


def test_what_comes_after_the_rows_wanted_is_not_read(tmp_path: Path) -> None:
    path = trace(tmp_path, "output_tokens\n3\n4\nmany\n")
    assert read_length_trace(path, at_least=1, at_most=2).response_tokens.tolist() == [3, 4]
    with pytest.raises(ValueError, match="line 4"):
        read_length_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no column output_tokens: its columns are none; name"),
        ("length,n\n3,1\n", r"has no column output_tokens: its columns are length, n; name"),
        ("output_tokens\n", r"has 0 rows, and 2 responses are needed: lower --batch$"),
        ("output_tokens\n3\n", r"has 1 rows, and 2 responses are needed: lower --batch$"),
        ("output_tokens\n3\nmany\n", r"line 3: output_tokens is 'many', not a whole number of tokens: correct"),
        ("output_tokens\n3\n-4\n", r"line 3: output_tokens is '-4', not a whole number"),
        ("output_tokens\n3\n4.5\n", r"line 3: output_tokens is '4\.5', not a whole number"),
        ("output_tokens,prompt_tokens\n3,4\n5\n", r"line 3: prompt_tokens is None, not a whole number"),
    ],
)
def test_an_unusable_file_is_refused_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_length_trace(trace(tmp_path, text), at_least=2, remedy="lower --batch")
    assert "\n" not in str(refusal.value)
    assert "lengths.csv" in str(refusal.value)

"""Prompts from CSV and TSV files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from fuse.trainers.data import read_rows

ROWS = [{"q": "1+1=", "a": "2"}, {"q": 'one, "two"\nthree', "a": "é"}]
CSV = 'q,a\r\n1+1=,2\r\n\r\n"one, ""two""\nthree",é\r\n'.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", CSV),
        ("P.CSV", b"\xef\xbb\xbf" + CSV),
        ("p.csv.gz", gzip.compress(CSV)),
        ("p.tsv", 'q\ta\n1+1=\t2\n"one, ""two""\nthree"\té\n'.encode()),
    ],
)
def test_values_are_strings(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(tmp_path / name)) == ROWS


def test_a_prompt_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("q\n" + "x" * 200_000)
    assert len(read_rows(tmp_path / "p.csv")[0]["q"]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a\n1,2,3\n", r"p\.csv:2 has 3 values, the first line has 2 names: put values .* in \"quotes\""),
        (b"q,a\n1,2\n1\n", r"p\.csv:3 has 1 values, the first line has 2 names"),
        (b"q,q\n1,2\n", r"p\.csv names a column twice in its first line"),
        (b'q,a\n"1"2,3\n', r"p\.csv:2 is damaged \(.+\): write the file again"),
        ("q\né\n".encode("latin-1"), r"p\.csv is not UTF-8 .*: convert the file"),
        (b"q,a\n", r"p\.csv is empty"),
        (b"", r"p\.csv is empty"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / "p.csv")
    assert "\n" not in str(caught.value)

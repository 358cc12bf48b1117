"""Rows of files with a header line and a record a line: CSV, and TSV with tabs."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def is_table(path: Path) -> bool:
    """By its name, of which `.gz` is no part."""
    return _suffix(path) in _SEPARATORS


def table_rows(content: bytes, path: Path) -> list[dict[str, str]]:
    """The rows of `path`, whose content this is; every value is a string.

    Raises:
        ValueError: no UTF-8, no header, or a line with more or fewer values than the header has names.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert the file") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # prompts may be longer than the 128 KiB that it begins with
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_SEPARATORS[_suffix(path)], strict=True)
    rows: list[dict[str, str]] = []
    try:
        header = next(lines, [])
        if len(set(header)) != len(header):
            raise ValueError(f"{path} names a column twice in its first line: rename one")
        for values in lines:
            if not values:
                continue  # a blank line
            if len(values) != len(header):
                raise ValueError(
                    f"{path}:{lines.line_num} has {len(values)} values, the first line has {len(header)} names: put "
                    f'values that hold a separator or a line break in "quotes"'
                )
            rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num} is damaged ({error}): write the file again") from error
    return rows


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix

"""What others wrote, read with care: text, JSON and CSV whose every fault is one ValueError with its place."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

_MOST_DEPTH = 100
_MOST_BITS = 63


def read_text(path: Path, contents: str) -> str:
    """A file's text. contents: what it should hold, for the message.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text: give {contents}") from None


def read_json(path: Path, contents: str, *, any_number: bool = False) -> object:
    """The value in a JSON file. contents: what it should hold, for the message. any_number: as of `parse_json`.

    Raises:
        ValueError: it is not JSON as `parse_json` takes it.
        OSError: it cannot be read.
    """
    try:
        return parse_json(read_text(path, contents), any_number=any_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): give {contents}") from None
    except NotReadableError as error:
        raise ValueError(f"{path} {error}: give {contents}") from None


class NotReadableError(ValueError):
    """JSON that no reader here takes: what is wrong, to follow the name of its place."""


def parse_json(text: str, *, any_number: bool = False) -> object:
    """The value that JSON text stands for.

    any_number: take integers of more than 64 bits, NaN and infinity, too.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        NotReadableError: it is nested too deep, or has a number that 64 bits do not hold.
    """
    own = {} if any_number else {"parse_int": _integer, "parse_float": _finite, "parse_constant": _finite}
    try:
        value: object = json.loads(text, **own)  # type: ignore[arg-type]
        is_deep = _is_deep(value)
    except RecursionError:
        is_deep = True
    except (json.JSONDecodeError, NotReadableError):
        raise
    except ValueError:  # Python's own limit
        raise NotReadableError("has an integer of thousands of digits") from None
    if is_deep:
        raise NotReadableError(f"is nested more than {_MOST_DEPTH} deep")
    return value


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line, from 1, and cells of each row that is not blank, as they are read.

    Raises:
        ValueError: the file is not CSV in UTF-8.
        OSError: it cannot be read.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path} line {max(1, reader.line_num)} is not CSV ({error}): correct the line") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert the file") from None


def finite_number(members: Mapping[str, object], name: str, most: float) -> float | None:
    """The member if it is a number from -most to most, else None."""
    value = members.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -most <= value <= most else None  # type: ignore[operator, return-value]


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >> _MOST_BITS:
        raise NotReadableError(f"has the integer {text[:24]}, beyond 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotReadableError(f"has the number {text[:24]}, which is not finite")
    return value


def _is_deep(value: object) -> bool:
    """Whether containers are nested deeper than readers go by recursion."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True

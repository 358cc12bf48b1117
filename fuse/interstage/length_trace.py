"""Recorded lengths of responses, as CSV: a row per response, in the order in which they came."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schedules.reading import csv_rows

Ints = NDArray[np.int64]

MOST_TOKENS = 1 << 20
"""Of a prompt or a response: curves of lengths have a point per token."""


@dataclass(frozen=True, slots=True, eq=False)
class LengthTrace:
    """Recorded lengths [rows], and a key per row that is equal for equal prompts, or None."""

    prompt_tokens: Ints
    response_tokens: Ints
    prompts: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.response_tokens)

    def rows(self, chosen: Ints) -> LengthTrace:
        """These rows alone."""
        prompts = tuple(self.prompts[row] for row in chosen)
        return LengthTrace(self.prompt_tokens[chosen], self.response_tokens[chosen], prompts)

    def cut(self, max_tokens: int) -> LengthTrace:
        """With responses of at most `max_tokens`."""
        return LengthTrace(self.prompt_tokens, np.minimum(self.response_tokens, max_tokens), self.prompts)


def read_length_trace(
    path: Path,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    prompt_tokens: int = 1,
    remedy: str = "give a longer file",
) -> LengthTrace:
    """The first rows of a file's columns output_tokens, prompt_tokens and prompt_id, of which the first must be there.

    No length is below one token. at_least, at_most: rows that are needed, and that are read. prompt_tokens: where the
    file has none. remedy: against too few rows.

    Raises:
        ValueError: no column output_tokens, too few rows, or a length that is no whole number or too large.
    """
    rows = csv_rows(path)
    _, columns = next(rows, (1, []))
    if "output_tokens" not in columns:
        raise ValueError(
            f"{path} has no column output_tokens: its columns are {', '.join(columns) or 'none'}; name the column "
            "of the responses' lengths so"
        )
    prompts, responses, keys = [], [], []
    for line, cells in islice(rows, at_most):
        row: dict[str, str | None] = dict(zip_longest(columns, cells[: len(columns)]))
        responses.append(_length(path, line, "output_tokens", row["output_tokens"]))
        prompts.append(
            _length(path, line, "prompt_tokens", row["prompt_tokens"]) if "prompt_tokens" in row else prompt_tokens
        )
        keys.append(row.get("prompt_id"))
    if len(responses) < at_least:
        raise ValueError(f"{path} has {len(responses)} rows, and {at_least} responses are needed: {remedy}")
    return LengthTrace(np.array(prompts, dtype=np.int64), np.array(responses, dtype=np.int64), tuple(keys))


def _length(path: Path, line: int, column: str, text: str | None) -> int:
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"{path} line {line}: {column} is {text!r}, not a whole number of tokens: correct the line")
    digits = text.strip().lstrip("0")
    if len(digits) > len(str(MOST_TOKENS)) or int(digits or "0") > MOST_TOKENS:
        raise ValueError(f"{path} line {line}: {column} is {digits[:24]}: the most is {MOST_TOKENS} tokens")
    return max(1, int(digits or "0"))

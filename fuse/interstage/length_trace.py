"""Recorded lengths of prompts and responses, read from a file."""

from __future__ import annotations

import csv
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LengthTrace:
    """Recorded lengths [rows], and a key per row that is equal for equal prompts, or None."""

    prompt_tokens: Ints
    response_tokens: Ints
    prompts: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.response_tokens)

    def cut(self, max_tokens: int) -> LengthTrace:
        """The trace with responses of at most `max_tokens`.

        Raises:
            ValueError: max_tokens < 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: a response has at least one token")
        return LengthTrace(self.prompt_tokens, np.minimum(self.response_tokens, max_tokens), self.prompts)


def read_trace(path: Path, prompt_tokens: int) -> LengthTrace:
    """Read a CSV trace; rows without prompt_tokens get the ones given, and no length is below one token.

    Raises:
        ValueError: no column output_tokens, no rows, or a length that is no number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "output_tokens" not in columns:
            raise ValueError(f"{path} has no column output_tokens: its columns are {', '.join(columns) or 'none'}")
        prompts, responses, keys = [], [], []
        for row in reader:
            responses.append(_length(path, reader.line_num, "output_tokens", row["output_tokens"]))
            prompts.append(
                _length(path, reader.line_num, "prompt_tokens", row["prompt_tokens"])
                if "prompt_tokens" in columns
                else prompt_tokens
            )
            keys.append(row.get("prompt_id"))
    if not responses:
        raise ValueError(f"{path} has no rows: a trace has one per response")
    return LengthTrace(np.array(prompts, dtype=np.int64), np.array(responses, dtype=np.int64), tuple(keys))


def _length(path: Path, line: int, column: str, text: str | None) -> int:
    try:
        return max(1, int(text or ""))
    except ValueError:
        raise ValueError(f"{path} line {line}: {column} is {text!r}, not a whole number") from None

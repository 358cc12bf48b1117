"""What proposes tokens for the target to verify: several at once, where decoding has one per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fuse.engines.rows import Row, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Of a draft, before it has drafted.

    step_share: what a step of it takes of one of the target; 0 if it never takes any time. chance: that a token is
    right if all before it are.
    """

    step_share: float
    chance: float


class Draft(Protocol):
    """Guesses what samples will draw. Tokens never depend on it, only how many of them a step brings.

    A sample's next token is argmax(logits / temperature + noise), and the noise is known beforehand: a function of
    (seed, sample, position). A draft that adds the same noise to logits close to the target's agrees nearly always.
    """

    reads_window: bool
    """Whether the last proposal came from a part of the keys that it could have read."""

    def prepare(self) -> None:
        """Make what proposals need, which takes its time after weights have changed. Called before each of them."""
        ...

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        """At most `counts[row]` tokens, of the model's vocabulary, to follow those of each row.

        Post: the rows are as they were.
        """
        ...

    def release(self, row: Row) -> None:
        """A row leaves, finished or not."""
        ...

    def forget(self) -> None:
        """The model's weights are freed or change; rows have left."""
        ...

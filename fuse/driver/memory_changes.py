"""What a stage takes and frees while it runs, recorded for one length of sequences and known for all."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from fuse.intrastage.live_memory import LiveMemory

RECORDED_LENGTH = 1_000_003
"""Tokens: a prime that divides no size of a weight, so a tensor's bytes tell how often it was multiplied in."""
_ITEMSIZES = (1, 2, 4, 8)


class MemoryRecord(LiveMemory):
    """Live memory whose every change is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._changes: list[int] = []

    def _change(self, num_bytes: int) -> None:
        super()._change(num_bytes)
        self._changes.append(num_bytes)

    def taken(self) -> tuple[int, ...]:
        """The changes since this was asked last, in bytes: positive where memory is taken."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes


@dataclass(frozen=True, slots=True)
class MemoryChanges:
    """Of a stage that ran on sequences of `length` tokens: the changes of its parts, one after the other."""

    length: int
    parts: tuple[tuple[int, ...], ...]

    def at(self, length: int) -> MemoryChanges:
        """As they are for sequences of another length, of which each tensor has a power as its factor or none."""
        scaled = {change: self._scaled(change, length) for change in set(itertools.chain(*self.parts))}
        return MemoryChanges(length, tuple(tuple(scaled[change] for change in part) for part in self.parts))

    def are_powers(self, weights: Collection[int]) -> bool:
        """Whether sizes that the length does not divide are those of weights of so many elements, or of next to none.

        Others may be of tensors one token longer than the sequences, of which `at` knows nothing.
        """
        sizes = {abs(change) for part in self.parts for change in part if change % self.length}
        known = {number * itemsize for number in weights for itemsize in _ITEMSIZES}
        return all(size < self.length // 2 or size in known for size in sizes)

    def kept(self, part: int) -> int:
        """Bytes by which a part has raised what is held."""
        return sum(self.parts[part])

    def rise(self, part: int) -> int:
        """The most bytes at once in a part beyond those at its start."""
        return max(itertools.accumulate(self.parts[part], initial=0))

    def _scaled(self, change: int, length: int) -> int:
        factor = 1
        while change and change % self.length == 0:
            change //= self.length
            factor *= length
        return change * factor

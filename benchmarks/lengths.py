"""Response lengths that benchmarks force: of a trace, or made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fuse.interstage.length_trace import read_length_trace


@dataclass(frozen=True, slots=True)
class Mix:
    """Response lengths of a batch, and those of the past that policies learn from."""

    name: str
    lengths: Sequence[int]
    past: Sequence[int]


def response_lengths(path: Path | None, at_least: int, at_most: int | None = None) -> list[int]:
    """The first `at_most` lengths of a trace; without one so many made-up ones.

    Raises:
        ValueError: the trace has fewer than `at_least`, or is none.
    """
    at_most = at_most or at_least
    if path is None:
        return synthetic_lengths(at_most)
    lengths: list[int] = read_length_trace(path, at_least=at_least, at_most=at_most).response_tokens.tolist()
    return lengths


def synthetic_lengths(num_samples: int) -> list[int]:
    """Log-normal with sigma 0.6: the longest of 128 is some five times the median, as in chat traces."""
    generator = torch.Generator().manual_seed(0)
    return (100 * (0.6 * torch.randn(num_samples, generator=generator)).exp()).round().long().tolist()


def scaled(lengths: Sequence[int], factor: float) -> list[int]:
    """Lengths in proportion, each at least one token."""
    return [max(1, round(factor * length)) for length in lengths]


def scaled_to(lengths: Sequence[int], longest: int) -> list[int]:
    """Lengths in proportion, the longest of them `longest` tokens and each at least one."""
    return scaled(lengths, longest / max(lengths))

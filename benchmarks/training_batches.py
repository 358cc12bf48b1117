"""What `fuse bench training` trains on: made-up samples whose lengths alone matter."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fuse.algorithms.batch import Experience, Segments
from fuse.algorithms.gae import ppo_targets
from fuse.benchmarks.rollout import synthetic_lengths
from fuse.intrastage.cost_profile import Shape


def response_lengths(path: Path | None, num_samples: int) -> list[int]:
    """The first values of a CSV file's column output_tokens; without a file, of a long-tailed distribution.

    Raises:
        ValueError: the file has no such column, too few rows, or other things than positive numbers.
    """
    if path is None:
        return synthetic_lengths(num_samples)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "output_tokens" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column output_tokens: its columns are {reader.fieldnames}")
        values = [row["output_tokens"] for row, _ in zip(reader, range(num_samples), strict=False)]
    if len(values) < num_samples:
        raise ValueError(f"{path} has {len(values)} rows, and {num_samples} samples are needed: give a longer file")
    for value in values:
        if not (value or "").isdecimal() or int(value) < 1:
            raise ValueError(f"{path}: output_tokens holds {value!r}, which is no positive number of tokens")
    return [int(value) for value in values]


def scaled(lengths: Sequence[int], num_sequences: int, longest: int) -> list[int]:
    """Lengths in proportion, each at least one, the longest of each `num_sequences` in a row `longest` on average."""
    groups = [lengths[start : start + num_sequences] for start in range(0, len(lengths), num_sequences)]
    factor = longest / statistics.mean(max(group) for group in groups)
    return [max(1, round(factor * length)) for length in lengths]


def made_experience(prompt_tokens: int, lengths: Sequence[int], vocab_size: int) -> Experience:
    """Random samples with prompts of `prompt_tokens` and responses of `lengths` tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab_size, (count,), generator=generator).tolist())

    segments = Segments.from_lengths(lengths, max(lengths))
    num_tokens, num_values = int(segments.token_offsets[-1]), int(segments.value_offsets[-1])
    prompts, responses = tuple(tokens(prompt_tokens) for _ in lengths), tuple(map(tokens, lengths))
    return Experience(
        prompts=prompts,
        responses=responses,
        lengths=tuple(lengths),
        width=max(lengths),
        segments=segments,
        targets=ppo_targets(
            responses,
            lengths,
            logprobs=torch.full((num_tokens,), -float(torch.tensor(vocab_size).log())),
            advantages=torch.randn(num_tokens, generator=generator),
            values=torch.zeros(num_values),
            returns=torch.randn(num_values, generator=generator),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The micro-batches of one optimizer step: sample indices of each. lengths: what their mix is called."""

    lengths: str
    micro_batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Samples with every mix of lengths, and what is trained on them."""

    experience: Experience
    tasks: tuple[Task, ...]

    def shape(self, samples: Sequence[int]) -> Shape:
        """The shape of the micro-batch that these samples make."""
        experience = self.experience
        return Shape(len(samples), max(len(experience.prompts[one]) + experience.lengths[one] for one in samples))

    def buckets(self) -> list[tuple[int, ...]]:
        """A micro-batch of each shape to measure on: of each mix the smallest, the middle and the largest."""
        chosen: dict[Shape, tuple[int, ...]] = {}
        for lengths in {task.lengths: None for task in self.tasks}:
            of_mix = {
                self.shape(samples): samples
                for task in self.tasks
                if task.lengths == lengths
                for samples in task.micro_batches
            }
            by_size = sorted(of_mix, key=lambda shape: (shape.size, shape))
            for shape in (by_size[0], by_size[len(by_size) // 2], by_size[-1]):
                chosen[shape] = of_mix[shape]
        return list(chosen.values())


def workload(
    mixes: Mapping[str, Sequence[int]],
    counts: Sequence[int],
    *,
    num_sequences: int,
    prompt_tokens: int,
    vocab_size: int,
) -> Workload:
    """Of each mix of response lengths a task per number of micro-batches in `counts`, all on its first samples."""
    lengths = [length for mix in mixes.values() for length in mix]
    tasks = []
    first = 0
    for name, mix in mixes.items():
        for count in counts:
            starts = range(first, first + count * num_sequences, num_sequences)
            batches = tuple(tuple(range(start, start + num_sequences)) for start in starts)
            tasks.append(Task(lengths=name, micro_batches=batches))
        first += len(mix)
    return Workload(made_experience(prompt_tokens, lengths, vocab_size), tuple(tasks))

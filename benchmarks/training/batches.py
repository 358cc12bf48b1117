"""What `fuse bench training` trains on: made-up samples whose lengths alone matter."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fuse.algorithms.batch import Experience, Segments, counted_tokens, made_up_targets
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.benchmarks.lengths import response_lengths, scaled
from fuse.benchmarks.training.settings import SETTINGS
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.micro_batch_number import TIMES, Work
from fuse.intrastage.observed import one_of_each
from fuse.training.regrouping import Dealing, regrouped
from fuse.training.rounds import Round, StepPart

UNIFORM, MIXED = "uniform", "mixed"


def made_experience(prompt_tokens: int, lengths: Sequence[int], vocab_size: int) -> Experience:
    """Random tokens, with prompts of `prompt_tokens` and responses of `lengths`; what losses compare with is zero."""
    generator = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, vocab_size, count).tolist())

    responses = tuple(map(tokens, lengths))
    segments = Segments.from_lengths(lengths, max(lengths))
    token_ids = counted_tokens(responses, lengths)
    return Experience(
        prompts=tuple(tokens(prompt_tokens) for _ in lengths),
        responses=responses,
        lengths=tuple(lengths),
        width=max(lengths),
        segments=segments,
        targets={
            "actor": made_up_targets(PolicyTargets, token_ids, segments),
            "critic": made_up_targets(ValueTargets, token_ids, segments),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The micro-batches of one optimizer step as drawn: sample indices of each. lengths: what their mix is called."""

    lengths: str
    micro_batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Samples with every mix of lengths, and what is trained on them. regroups: see `prepared`.

    chooses_number: of micro-batches, each side the one by which it should train soonest.
    """

    experience: Experience
    tasks: tuple[Task, ...]
    regroups: bool = True
    chooses_number: bool = True

    def prepared(self, rounds: Sequence[Round], times: float = 1.0) -> list[Round]:
        """The rounds as they are trained: an optimizer step's samples are dealt into micro-batches by what they cost.

        times: as many as were drawn.
        """
        units = dict.fromkeys(self.experience.targets, 1) if self.regroups else {}
        return regrouped(rounds, self.experience, units, Dealing(times=times, packs=SETTINGS.layout.packs))

    def work(self, rounds: Sequence[Round]) -> list[Work]:
        """What the planner asks of them."""
        return [
            Work({role: tuple(map(self.shape, part.micro_batches)) for role, part in one.parts.items()})
            for one in rounds
        ]

    def micro_batches(self, task: Task, times: float = 1.0) -> tuple[tuple[int, ...], ...]:
        """Of the task, as they are trained."""
        part = StepPart(micro_batches=task.micro_batches, weights=(1.0,) * len(task.micro_batches), is_last=True)
        (made,) = self.prepared([Round({"actor": part})], times)
        return made.parts["actor"].micro_batches

    def padding(self, task: Task, times: float = 1.0) -> float:
        """Computed tokens over real ones."""
        trained = self.micro_batches(task, times)
        real = sum(self.shape([sample]).size for samples in trained for sample in samples)
        return sum(self.shape(samples).size for samples in trained) / real

    def shape(self, samples: Sequence[int]) -> Shape:
        """The shape of the micro-batch that these samples make."""
        return SETTINGS.layout.shape(self.experience, samples)

    def buckets(self) -> list[tuple[int, ...]]:
        """A micro-batch of each shape to measure on: of each mix the smallest, the middle and the largest.

        And where the number may be larger than was drawn, the smallest of as many as there may be.
        """
        chosen: dict[Shape, tuple[int, ...]] = {}
        for lengths in dict.fromkeys(task.lengths for task in self.tasks):
            tasks = [task for task in self.tasks if task.lengths == lengths]
            drawn = {self.shape(one): one for task in tasks for one in self.micro_batches(task)}
            chosen |= {shape: drawn[shape] for shape in one_of_each(list(drawn))}
            if self.regroups and self.chooses_number:
                most = {self.shape(one): one for task in tasks for one in self.micro_batches(task, TIMES[-1])}
                smallest = one_of_each(list(most))[0]
                chosen[smallest] = most[smallest]
        return list(chosen.values())


def load_of(
    path: Path | None,
    counts: Sequence[int],
    *,
    num_sequences: int,
    sequence_tokens: int,
    vocab_size: int,
    regroups: bool = True,
    chooses_number: bool = True,
) -> Workload:
    """A uniform mix and that of a trace, or a made-up one, with tasks of so many micro-batches as `counts` has.

    A quarter of a sequence is its prompt; mixed micro-batches as they are drawn are as long as uniform ones on average.
    """
    num_samples = num_sequences * max(counts)
    prompt_tokens = max(1, sequence_tokens // 4)
    response_tokens = sequence_tokens - prompt_tokens
    mixes = {
        UNIFORM: [response_tokens] * num_samples,
        MIXED: scaled_in_groups(response_lengths(path, num_samples), num_sequences, response_tokens),
    }
    made = workload(
        mixes,
        counts,
        num_sequences=num_sequences,
        prompt_tokens=prompt_tokens,
        vocab_size=vocab_size,
        regroups=regroups,
    )
    return replace(made, chooses_number=chooses_number)


def scaled_in_groups(lengths: Sequence[int], num_sequences: int, longest: int) -> list[int]:
    """Lengths in proportion, each at least one, the longest of each `num_sequences` in a row `longest` on average."""
    groups = [lengths[start : start + num_sequences] for start in range(0, len(lengths), num_sequences)]
    return scaled(lengths, longest / statistics.mean(max(group) for group in groups))


def workload(
    mixes: Mapping[str, Sequence[int]],
    counts: Sequence[int],
    *,
    num_sequences: int,
    prompt_tokens: int,
    vocab_size: int,
    regroups: bool = True,
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
    return Workload(made_experience(prompt_tokens, lengths, vocab_size), tuple(tasks), regroups)

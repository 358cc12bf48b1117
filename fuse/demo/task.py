"""The arithmetic task: sums written out step by step, whose worked answers have a naturally long-tailed length.

A problem is `7+9+5=` and its worked answer `7+9=16;16+5=21;#21`: one step per added term, then the result. The number
of terms is geometric, so most answers are short and a few many times longer, as in real chat and reasoning traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ANSWER_MARK = "#"
MIN_TERMS = 2
SLIPS = (1, 2, 10, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumTask:
    """Distribution of problems: 2 + Geometric(`stop_probability`) terms, at most `max_terms`, each in 1..`max_term`."""

    max_terms: int = 10
    max_term: int = 9
    stop_probability: float = 0.4

    @property
    def max_response_tokens(self) -> int:
        """Characters of the longest right answer, and its end token."""
        return len(worked_answer((self.max_term,) * self.max_terms)) + 1

    def problems(self, seed: int) -> Iterator[tuple[int, ...]]:
        """Yield the terms of problem after problem, endlessly; one seed gives one sequence."""
        generator = np.random.default_rng(seed)
        while True:
            num_terms = min(MIN_TERMS - 1 + int(generator.geometric(self.stop_probability)), self.max_terms)
            yield tuple(int(term) for term in generator.integers(1, self.max_term + 1, size=num_terms))

    def demonstrations(self, seed: int, slip_probability: float = 0.0) -> Iterator[tuple[str, str]]:
        """Yield prompt and worked answer, endlessly, by a teacher who slips by one or two in a digit of some totals."""
        generator = np.random.default_rng([seed, 1])
        for terms in self.problems(seed):
            num_steps = len(terms) - 1
            slipped = generator.random(num_steps) < slip_probability
            slips = slipped * generator.choice(SLIPS, num_steps)
            yield prompt_text(terms), worked_answer(terms, tuple(slips.tolist()))


def prompt_text(terms: tuple[int, ...]) -> str:
    """`(7, 9, 5)` -> `7+9+5=`."""
    return "+".join(map(str, terms)) + "="


def worked_answer(terms: tuple[int, ...], slips: tuple[int, ...] | None = None) -> str:
    """`(7, 9, 5)` -> `7+9=16;16+5=21;#21`; `slips` are added to the steps' totals: (1, 0) gives `7+9=17;...`."""
    total, steps = terms[0], []
    for term, slip in zip(terms[1:], slips or (0,) * (len(terms) - 1), strict=True):
        steps.append(f"{total}+{term}={total + term + slip};")
        total += term + slip
    return "".join(steps) + f"{ANSWER_MARK}{total}"


def exact_match(prompts: list[str], responses: list[str], **columns: list[object]) -> list[float]:
    """Reward: 1.0 where the text after the response's only answer mark is the sum of the prompt's terms, else 0.0."""
    return [float(_is_right(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def exact_completion(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The same reward, as trainers without a critic call it."""
    return exact_match(prompts, completions)


def _is_right(prompt: str, response: str) -> bool:
    expected = sum(int(term) for term in prompt.rstrip("=").split("+"))
    _, *answers = response.split(ANSWER_MARK)
    return answers == [str(expected)]

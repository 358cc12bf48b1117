"""What drafting does to the cost of a token: a step of the target with k drafts for each sample brings several at once.

With a token's chance a of being right, a step brings E(k) = 1 + a + ... + a^k tokens of each sample in expectation: the
drafts up to the first wrong one, and the target's own. It takes k steps of the draft, one after the other, and one of
the target with k + 1 tokens for each sample. Of the target's step

    step_s + sample_s * batch + context_s * context

reading weights and keys costs the same however many tokens there are, and each token has to be computed. A step of the
draft takes c of `step_s` and `sample_s`; it has no cache of its own and reads the target's keys and values. So a token
of each sample takes, in the same terms,

    step_s * (1 + c k) / E(k),   sample_s * (k + 1 + c k) / E(k),   context_s * (1 + k) / E(k)

the last with 1 / E(k) where drafts read no keys. A draft that reads a window of r tokens only takes k r / E(k) of
`context_s` for each sample in place of k / E(k) for each token of context, and is right with a smaller a. All samples
have the same k and are read alike, as takes the least time for the batch.
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, section 3;
batches and context are ours. Deviation: responses' ends, which cut drafts short, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple

_MOST_TOKENS = 10**9
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"reads_context": (bool,), "window_tokens": (int,), "max_drafts": (int,)}
)
"""Of fields in JSON, where they are not numbers of any kind."""


class StepCosts(NamedTuple):
    """Seconds of a decode step, for its batch and the tokens of its context, as in the module's equation."""

    step_s: float
    sample_s: float
    context_s: float

    def seconds(self, batch: float, context_tokens: float) -> float:
        return self.step_s + self.sample_s * batch + self.context_s * context_tokens


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """That a step with so many drafts brings a sample."""
    return sum(acceptance**place for place in range(num_drafts + 1))


class Drafting(NamedTuple):
    """How a batch may be drafted for, in a window of keys or not; per_token: what a token of each sample takes then."""

    num_drafts: int
    acceptance: float
    per_token: StepCosts
    in_window: bool = False

    @property
    def tokens(self) -> float:
        """That a step brings a sample, in expectation."""
        return expected_tokens(self.acceptance, self.num_drafts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How well an engine drafts, and at what cost.

    acceptance: a token's chance of being drafted right. draft_share: what a step of the draft takes of one of the
    target, but for its context. reads_context: whether each step of the draft reads the target's keys and values.
    window_tokens: of each sample, which it may read in place of all; 0 if it does not. window_share: of the tokens that
    it would draft right if it read all, those that it does then. max_drafts: tokens drafted at once, at most.

    Raises:
        ValueError: a share that is none, or no drafts.
    """

    acceptance: float
    draft_share: float
    reads_context: bool
    window_tokens: int = 0
    window_share: float = 1.0
    max_drafts: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance is {self.acceptance}: a chance is 0 to 1")
        if not 0 <= self.draft_share <= 1:
            raise ValueError(f"draft_share is {self.draft_share}: a draft's step takes 0 to 1 of the target's")
        if not 0 <= self.window_tokens <= _MOST_TOKENS:
            raise ValueError(f"window_tokens is {self.window_tokens}: a window has 0 to {_MOST_TOKENS} tokens")
        if not 0 <= self.window_share <= 1:
            raise ValueError(f"window_share is {self.window_share}: 0 to 1 of what is right without a window")
        if not 1 <= self.max_drafts <= 64:
            raise ValueError(f"max_drafts is {self.max_drafts}: draft 1 to 64 tokens at once")

    def choices(self, plain: StepCosts) -> list[Drafting]:
        """What may be the best where steps take `plain` without drafts: none, and each number, by either reading."""
        found = [Drafting(0, 0.0, plain)]
        for count in range(1, self.max_drafts + 1):
            found.append(self._drafting(plain, count, self.acceptance, int(self.reads_context), 0))
            if self.window_tokens:
                found.append(self._drafting(plain, count, self.acceptance * self.window_share, 0, self.window_tokens))
        return found

    def _drafting(
        self, plain: StepCosts, count: int, acceptance: float, reads_context: int, reads_tokens: int
    ) -> Drafting:
        tokens, drafting = expected_tokens(acceptance, count), self.draft_share * count
        sample_s = plain.sample_s * (1 + count + drafting) + plain.context_s * count * reads_tokens
        context_s = plain.context_s * (1 + count * reads_context)
        each = StepCosts(plain.step_s * (1 + drafting) / tokens, sample_s / tokens, context_s / tokens)
        return Drafting(count, acceptance, each, reads_tokens > 0)

    def best(self, plain: StepCosts, batch: float, context_tokens: float) -> Drafting:
        """What takes the least seconds for such a batch."""
        return min(self.choices(plain), key=lambda one: one.per_token.seconds(batch, context_tokens))


DRAFTS: Mapping[str, Speculation] = MappingProxyType(
    {
        "int8": Speculation(acceptance=0.97, draft_share=0.5, reads_context=True, window_tokens=320, window_share=0.91),
        "int4": Speculation(acceptance=0.7, draft_share=0.32, reads_context=True, window_tokens=320, window_share=0.91),
        "ngram": Speculation(acceptance=0.17, draft_share=0.0, reads_context=False),
    }
)
"""By name of the engine's `speculation`, for weights in bf16 on a GPU.

Acceptance as measured with SmolLM2-135M on word problems, untruncated sampling at temperature 1: 0.97 of int8's tokens,
with the same noise, and 0.91 of these where it reads the first 64 and the last 256 of 1,700 to 3,600 tokens, which is
assumed of int4, too; n-grams brought 1.2 tokens a step. 0.7 of int4's tokens is with weights moved off the 4-bit grid
that SmolLM2's come on; larger models are said to lose less of 4 bits. That half of the bytes, or 5 bits of 16 and a
head of 8, take as much of the time is derived, not measured: where much of a step is messages between GPUs, as with
tensor parallelism, it is more.
"""


def speculation_from_json(value: object) -> Speculation:
    """What `asdict` makes of one.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    names = [field.name for field in fields(Speculation)]
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise ValueError(f"costs: speculation is {value!r}: it must be an object with {', '.join(names)}")
    for name in names:
        one, types = value[name], _TYPES.get(name, (int, float))
        if not isinstance(one, types) or (isinstance(one, bool) and bool not in types):
            raise ValueError(f"costs: {name} of speculation is {one!r}: it must be {types[-1].__name__}")
    return Speculation(**value)

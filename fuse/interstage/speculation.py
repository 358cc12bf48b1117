"""What drafting does to the cost of a token: a step of the target with k drafts for each sample brings several at once.

With a token's chance a of being right, a step brings E(k) = 1 + a + ... + a^k tokens of each sample in expectation: the
drafts up to the first wrong one, and the target's own. It takes k steps of the draft, one after the other, and one of
the target with k + 1 tokens for each sample. Of the target's step

    step_s + sample_s * batch + context_s * context

reading weights and keys costs the same however many tokens there are, and each token has to be computed. A step of the
draft takes c of `step_s` and `sample_s`; one that has no cache of its own reads all of the target's keys and values.
So a token of each sample takes, in the same terms,

    step_s * (1 + c k) / E(k),   sample_s * (k + 1 + c k) / E(k),   context_s * (1 + k) / E(k)

the last with 1 / E(k) where drafts read no keys. All samples have the same k, that of the least time for the batch.
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, section 3;
batches and context are ours. Deviation: responses' ends, which cut drafts short, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How well an engine drafts, and at what cost.

    acceptance: a token's chance of being drafted right. draft_share: what a step of the draft takes of one of the
    target, but for its context. reads_context: whether each step of the draft reads the target's keys and values.
    max_drafts: tokens drafted at once, at most.

    Raises:
        ValueError: a share that is none, or no drafts.
    """

    acceptance: float
    draft_share: float
    reads_context: bool
    max_drafts: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance is {self.acceptance}: a chance is 0 to 1")
        if not 0 <= self.draft_share <= 1:
            raise ValueError(f"draft_share is {self.draft_share}: a draft's step takes 0 to 1 of the target's")
        if not 1 <= self.max_drafts <= 64:
            raise ValueError(f"max_drafts is {self.max_drafts}: draft 1 to 64 tokens at once")

    def tokens(self, num_drafts: int) -> float:
        """Tokens that a step with so many drafts brings a sample, in expectation."""
        return sum(self.acceptance**place for place in range(num_drafts + 1))

    def per_token(self, num_drafts: int) -> tuple[float, float, float]:
        """What a token of each sample takes of `step_s`, `sample_s` and `context_s`."""
        drafting = self.draft_share * num_drafts
        reads = 1 + num_drafts * self.reads_context
        tokens = self.tokens(num_drafts)
        return (1 + drafting) / tokens, (1 + num_drafts + drafting) / tokens, reads / tokens

    def best(self, step_s: float, samples_s: float, context_s: float) -> int:
        """The number of drafts of least seconds, for a plain step that takes so long, for its samples and context."""

        def seconds(num_drafts: int) -> float:
            step, samples, context = self.per_token(num_drafts)
            return step * step_s + samples * samples_s + context * context_s

        return min(range(self.max_drafts + 1), key=seconds)


DRAFTS: Mapping[str, Speculation] = MappingProxyType(
    {
        "int8": Speculation(acceptance=0.97, draft_share=0.5, reads_context=True),
        "ngram": Speculation(acceptance=0.17, draft_share=0.0, reads_context=False),
    }
)
"""By name of the engine's `speculation`, for weights in bf16 on a GPU.

Acceptance as measured with SmolLM2-135M on word problems, untruncated sampling at temperature 1: 0.97 of int8's tokens,
with the same noise; n-grams brought 1.2 tokens a step. That half of the bytes take half of the time is derived, not
measured: where much of a step is messages between GPUs, as with tensor parallelism, it is more.
"""


def speculation_from_json(value: object) -> Speculation:
    """What `asdict` makes of one.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    types = {"acceptance": (int, float), "draft_share": (int, float), "reads_context": (bool,), "max_drafts": (int,)}
    names = [field.name for field in fields(Speculation)]
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise ValueError(f"costs: speculation is {value!r}: it must be an object with {', '.join(names)}")
    for name in names:
        one = value[name]
        if not isinstance(one, types[name]) or (isinstance(one, bool) and name != "reads_context"):
            raise ValueError(f"costs: {name} of speculation is {one!r}: it must be {types[name][-1].__name__}")
    return Speculation(**value)

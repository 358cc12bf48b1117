"""Speculative decoding: which draft an engine has, how far it drafts, and what it proposes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Protocol

from fuse.engines.decoder import Decoder
from fuse.engines.draft import Draft
from fuse.engines.draft_lengths import DraftedStep, PayingLengths
from fuse.engines.engine import GeneratedToken
from fuse.engines.native_llama import is_served
from fuse.engines.ngram_draft import EXPECTED, NgramDraft
from fuse.engines.quantized_draft import QuantizedSelf
from fuse.engines.quantized_model import PRECISIONS
from fuse.engines.rows import Rows
from fuse.ops.quantized_linear import choose_for

SpeculationKind = Literal["auto", "off", "int8", "int4", "ngram"]


class DraftLengths(Protocol):
    """Decides how many tokens are drafted."""

    def choose(self, rows: Rows) -> Sequence[int]:
        """Tokens to draft for each row, if its response has room for them."""
        ...

    def learn(self, step: DraftedStep) -> None:
        """What a step took and brought for which lengths were chosen."""
        ...


class FixedLength:
    """As many for each row, always."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def choose(self, rows: Rows) -> Sequence[int]:
        return [self._num_tokens] * len(rows)

    def learn(self, step: DraftedStep) -> None:
        """Nothing."""


class Speculation:
    """A draft, and how far it drafts.

    num_tokens: that responses may consist of; a draft ends before any other.
    """

    def __init__(self, draft: Draft, lengths: DraftLengths, num_tokens: int) -> None:
        self.draft = draft
        self._lengths = lengths
        self._num_tokens = num_tokens
        self._drafts: list[list[int]] = []
        self._prepare_s = self._draft_s = self._began_s = 0.0
        self.proposing_s = 0.0
        """What the last proposal took, all in all."""

    def propose(self, rows: Rows) -> list[list[int]]:
        """What may follow each row's tokens: fewer tokens than its response may still get, for a step adds one more."""
        asked_s = time.perf_counter()
        counts = [min(count, row.num_left - 1) for count, row in zip(self._lengths.choose(rows), rows, strict=True)]
        self._drafts = [[] for _ in counts]
        chosen_s = time.perf_counter()
        if any(counts):
            self.draft.prepare()
        began_s = time.perf_counter()
        if any(counts):
            proposed = zip(self.draft.propose(rows, counts), counts, strict=True)
            self._drafts = [_known(draft[:count], self._num_tokens) for draft, count in proposed]
        self._began_s = time.perf_counter()
        self._prepare_s, self._draft_s = began_s - chosen_s, self._began_s - began_s
        self.proposing_s = self._began_s - asked_s
        return self._drafts

    def learn(self, generated: Sequence[GeneratedToken]) -> None:
        """What the step brought that the last proposal was for."""
        target_s = time.perf_counter() - self._began_s
        self._lengths.learn(DraftedStep(generated, self._drafts, self._prepare_s, self._draft_s, target_s))


def _known(draft: list[int], num_tokens: int) -> list[int]:
    return draft[: next((i for i, token_id in enumerate(draft) if not 0 <= token_id < num_tokens), len(draft))]


def choose_speculation(kind: SpeculationKind, target: Decoder) -> Speculation | None:
    """The draft of this name for a target, which drafts as far as that pays; "auto" chooses one.

    Raises: ValueError where there is none such.
    """
    num_tokens = target.num_tokens or target.model.config.get_text_config().vocab_size
    if kind == "auto":
        kind = "int8" if is_served(target.model) else "ngram"
    if kind == "off":
        return None
    if kind == "ngram":
        return Speculation(NgramDraft(), PayingLengths(EXPECTED), num_tokens)
    if kind not in PRECISIONS:
        raise ValueError(f"speculation={kind!r} is unknown: use 'auto', 'off', 'int8', 'int4' or 'ngram'")
    device, dtype = target.model.device, target.model.dtype
    native, reason = choose_for(device, dtype)
    if native is None:
        raise ValueError(
            f"speculation={kind!r} with a model in {dtype} on {device}: its products are native code for float32, on "
            f"GPUs for bfloat16, too ({reason}); use 'ngram' or 'off'"
        )
    precision = PRECISIONS[kind]
    return Speculation(QuantizedSelf(target, precision), PayingLengths(precision.expected), num_tokens)

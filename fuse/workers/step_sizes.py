"""What the span of a decode step tells beside its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from fuse.engines.engine import GeneratedToken
from fuse.workers.unreported import Unreported


def step_sizes(tokens: Sequence[GeneratedToken], samples: Mapping[int, Unreported]) -> dict[str, object]:
    """Of a step that brought these tokens to samples which are as they were before it.

    batch: samples. tokens: that they got. context_tokens: they had. prefill_tokens: that were computed anew for those
    that entered, beside `shared_tokens`, which the engine had from others of the same prompt. drafted_tokens: that
    drafts proposed, in `draft_steps` one after the other and `draft_s` seconds. tried_tokens: of these, those that are
    known to be right or wrong, for a draft ends with its first wrong token. drafted_in_window: whether drafts read a
    part of the keys only.
    """
    batch = context = prefill = shared = drafted = draft_steps = tried = 0
    for sample_id, own in groupby(tokens, key=lambda token: token.sample_id):
        first, *right = own
        sample = samples[sample_id]
        batch += 1
        context += sample.context_tokens
        prefill += sample.prefill_tokens - first.shared_tokens
        shared += first.shared_tokens
        drafted += first.drafted_tokens
        draft_steps = max(draft_steps, first.drafted_tokens)
        tried += min(len(right) + 1, first.drafted_tokens)
    return {
        "batch": batch,
        "tokens": len(tokens),
        "drafted_tokens": drafted,
        "draft_steps": draft_steps,
        "tried_tokens": tried,
        "draft_s": sum(token.draft_s for token in tokens[:1]),
        "drafted_in_window": any(token.drafted_in_window for token in tokens[:1]),
        "context_tokens": context,
        "prefill_tokens": prefill,
        "shared_tokens": shared,
    }

"""The n-gram draft: what it takes from a sample's text, and from its siblings'."""

from __future__ import annotations

import torch

from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.ngram_draft import NgramDraft
from fuse.engines.rows import Rows


def rows_of(*samples: tuple[int, tuple[int, ...], tuple[int, ...]]) -> Rows:
    """Of samples with these ids, prompts and responses."""
    rows = Rows(4, torch.device("cpu"))
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=100)
    rows.extend(
        [
            GenerationRequest(
                sample_id=sample_id,
                prompt_ids=prompt,
                params=params,
                response_ids=response,
                logprobs=(-1.0,) * len(response),
            )
            for sample_id, prompt, response in samples
        ]
    )
    return rows


def test_it_goes_on_as_the_text_did() -> None:
    """In the prompt, in the response, and across their border; at most as far as asked for."""
    draft = NgramDraft()
    rows = rows_of((0, (1, 2, 3, 4, 5, 6), (2, 3)), (1, (7, 8), (9, 7, 8)), (2, (1, 1), (20, 21)))
    assert draft.propose(rows, [3, 4, 4]) == [[4, 5, 6], [9, 7, 8, 9], []]
    assert draft.propose(rows, [1, 0, 4]) == [[4], [], []]


def test_a_longer_match_and_a_later_one_come_first() -> None:
    draft = NgramDraft()
    rows = rows_of((0, (1, 2, 3, 50, 9, 2, 3, 60, 2, 3, 70), (1, 2, 3)))
    assert draft.propose(rows, [1]) == [[50]]
    assert NgramDraft().propose(rows_of((0, (9, 2, 3, 60, 8, 2, 3, 70), (2, 3))), [1]) == [[70]]


def test_siblings_tell_each_other_also_when_they_have_left() -> None:
    draft = NgramDraft()
    rows = rows_of((0, (1, 2), (30, 31, 32)), (1, (1, 2), (40,)), (2, (1, 3), (30, 31)))
    assert draft.propose(rows, [4, 4, 4]) == [[], [], []]
    rows[0].response_ids += [33, 34]
    draft.release(rows[0])
    rows[1].response_ids += [31, 32]
    assert draft.propose(rows, [0, 4, 4]) == [[], [33, 34], []]


def test_few_tokens_are_no_match() -> None:
    assert NgramDraft().propose(rows_of((0, (4,), ()), (1, (4, 5), ())), [4, 4]) == [[], []]

"""What is scored within training steps has the bits that it has apart, and so do the weights.

In worlds of threads under NCCL's rules of waiting. Worlds of processes: tests/distributed/test_pipelines.py.
"""

from __future__ import annotations

import pytest

from fuse.training.late_scores import OLD_LOGPROBS, REFERENCE_LOGPROBS, with_scores
from fuse.training.rounds import Round, StepPart, unfused_counts

from ..distributed.fake_nccl import FakeNccl
from ..distributed.late_scoring import compare


@pytest.mark.parametrize(
    ("world", "is_opposite", "regroups", "slots"),
    [(2, False, True, 0), (3, False, False, 64), (2, True, False, 64), (3, True, True, 0)],
)
def test_steps_that_score_are_those_that_are_scored_before(
    world: int, is_opposite: bool, regroups: bool, slots: int
) -> None:
    found = FakeNccl(world, slots).run(lambda rank: compare(rank, world, is_opposite=is_opposite, regroups=regroups))
    last = found[-1]["values"][OLD_LOGPROBS], found[0]["values"][OLD_LOGPROBS]
    assert [len(each) for each in last] == ([3, 3] if is_opposite else [6, 0])  # samples 0 to 9, once
    if not is_opposite:
        assert len(found[-1]["values"][REFERENCE_LOGPROBS]) == 6
    for of_rank in found:
        assert all(all(each) for each in of_rank["values"].values())
        assert of_rank["weights"]
        assert of_rank["without the order"] > 1e-4
        assert of_rank["moved"] > 1e-3


def _round(*micro_batches: tuple[int, ...]) -> Round:
    return Round({"actor": StepPart(micro_batches=micro_batches, weights=(1.0,) * len(micro_batches), is_last=True)})


def test_which_step_scores_what() -> None:
    of_update = [_round((0, 1), (2,)), _round((3,), (4, 5)), _round((1, 2), (0,))]
    scored = with_scores(of_update, {REFERENCE_LOGPROBS, OLD_LOGPROBS})
    assert [dict(one.scored) for one in scored] == [
        {OLD_LOGPROBS: ((0, 1), (2,), (3,), (4, 5)), REFERENCE_LOGPROBS: ((0, 1), (2,))},
        {REFERENCE_LOGPROBS: ((3,), (4, 5))},
        {},
    ]
    assert scored[0].counts == (("actor", 2), (OLD_LOGPROBS, 4), (REFERENCE_LOGPROBS, 2))
    assert unfused_counts(scored) == [one.counts for one in scored]
    assert [one.counts for one in with_scores(of_update, ())] == [one.counts for one in of_update]

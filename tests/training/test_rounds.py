"""Rounds of optimizer steps: each role's own, in its order, whatever trains beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse.algorithms.batch import Experience, Segments, made_up_targets
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.intrastage.placement import Replica, replica_micro_batches
from fuse.micro_batch import Metric
from fuse.training.rounds import RankRound, Round, StepPart, by_tokens, rounds, step_reports, unfused_counts
from fuse.training.steps import OptimizerStep, optimizer_steps

ONE_EACH = {"actor": 1, "critic": 1}
LOSS = Metric("loss")


def steps(num_epochs: int, num_mini_batches: int, *, batch_size: int = 8) -> list[OptimizerStep]:
    """Of micro-batches of one sample."""
    order = [np.arange(batch_size)] * num_epochs
    return optimizer_steps(order, num_mini_batches=num_mini_batches, micro_batch_size=1)


def counts(found: list[Round]) -> list[dict[str, int]]:
    return [dict(one.counts) for one in found]  # type: ignore[arg-type]


def test_equal_steps_are_paired() -> None:
    same = steps(2, 2)
    for is_fused in (False, True):
        found = rounds({"actor": same, "critic": same}, ONE_EACH, is_fused=is_fused)
        assert [one.parts["actor"].micro_batches for one in found] == [one.micro_batches for one in same]
        assert all(one.parts["actor"] == one.parts["critic"] and one.parts["actor"].is_last for one in found)
        assert all(part.weights == (1 / 4,) * 4 for one in found for part in one.parts.values())


def test_a_step_of_the_actor_is_dealt_over_the_critics_rounds() -> None:
    of_roles = {"actor": steps(1, 1), "critic": steps(3, 1)}
    found = rounds(of_roles, ONE_EACH, is_fused=True)
    assert counts(found) == [{"actor": 3, "critic": 8}, {"actor": 3, "critic": 8}, {"actor": 2, "critic": 8}]
    assert [one.parts["actor"].is_last for one in found] == [False, False, True]
    assert [one.parts["critic"].is_last for one in found] == [True] * 3
    assert all(weight == 1 / 8 for one in found for weight in one.parts["actor"].weights), "of the whole step"
    assert unfused_counts(found) == [(("actor", 8), ("critic", 8)), (("critic", 8),), (("critic", 8),)]


def test_without_fusion_a_step_is_whole_and_the_others_are_alone() -> None:
    found = rounds({"actor": steps(1, 1), "critic": steps(1, 2)}, ONE_EACH, is_fused=False)
    assert counts(found) == [{"actor": 8, "critic": 4}, {"critic": 4}]
    assert unfused_counts(found) == [one.counts for one in found]


def test_every_replica_has_a_micro_batch_of_each_part() -> None:
    of_roles = {"actor": steps(1, 1, batch_size=5), "critic": steps(4, 1, batch_size=5)}
    found = rounds(of_roles, {"actor": 2, "critic": 1}, is_fused=True)
    assert counts(found) == [{"actor": 3, "critic": 5}, {"actor": 2, "critic": 5}, {"critic": 5}, {"critic": 5}]
    assert found[1].parts["actor"].is_last


def test_a_role_without_steps_does_not_train() -> None:
    assert counts(rounds({"actor": [], "critic": steps(2, 1)}, ONE_EACH, is_fused=True)) == [{"critic": 8}] * 2


@given(
    actor=st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 4])),
    critic=st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])),
    replicas=st.integers(1, 3),
    is_fused=st.booleans(),
)
def test_each_role_takes_its_own_steps_in_their_order(
    actor: tuple[int, int], critic: tuple[int, int], replicas: int, is_fused: bool
) -> None:
    of_roles = {"actor": steps(*actor, batch_size=12), "critic": steps(*critic, batch_size=12)}
    found = rounds(of_roles, {"actor": replicas, "critic": 1}, is_fused=is_fused)
    assert len(found) == max(map(len, of_roles.values()))
    for role, expected in of_roles.items():
        taken: list[tuple[tuple[int, ...], ...]] = [()]
        for part in (one.parts[role] for one in found if role in one.parts):
            assert len(part.micro_batches) >= (replicas if role == "actor" else 1)
            taken[-1] += part.micro_batches
            if part.is_last:
                taken.append(())
        assert taken == [*(step.micro_batches for step in expected), ()]
    apart = rounds(of_roles, {"actor": replicas, "critic": 1}, is_fused=False)
    assert unfused_counts(found) == [one.counts for one in apart]


LENGTHS = (1, 3, 0, 2)


def experience() -> Experience:
    """Four responses of up to 3 tokens, which have a value more unless they are as long as that: 2, 3, 1 and 3."""
    segments = Segments.from_lengths(LENGTHS, 3)
    tokens = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    kinds: dict[str, Any] = {"actor": PolicyTargets, "critic": ValueTargets}
    return Experience(
        prompts=((1,),) * 4,
        responses=tuple((1,) * length for length in LENGTHS),
        lengths=LENGTHS,
        width=3,
        segments=segments,
        targets={role: made_up_targets(kind, tokens, segments) for role, kind in kinds.items()},
    )


def part(*micro_batches: tuple[int, ...], is_last: bool = True) -> StepPart:
    return StepPart(micro_batches=micro_batches, weights=(9.0,) * len(micro_batches), is_last=is_last)


def test_every_token_of_a_step_counts_the_same_by_hand() -> None:
    """Sums of 6 tokens and of 9 values; the second round is another step of the critic, of 3 + 3 values."""
    first, second = by_tokens(
        [
            Round({"actor": part((0, 1), is_last=False), "critic": part((0, 1), (2, 3))}),
            Round({"actor": part((2,), (3,)), "critic": part((1,), (3,))}),
        ],
        experience(),
    )
    assert first.parts["actor"].weights == (4 / 6,)
    assert second.parts["actor"].weights == (0.0, 2 / 6)
    assert first.parts["critic"].weights == (5 / 9, 4 / 9)
    assert second.parts["critic"].weights == (3 / 6, 3 / 6)
    assert [list(one.parts) for one in (first, second)] == [["actor", "critic"]] * 2

    losses = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])  # of tokens: of samples 0 and 1, none of 2, of 3
    by_micro_batch = [losses[:4].mean(), losses[4:].mean()]
    in_step = first.parts["actor"].weights[0] * by_micro_batch[0] + second.parts["actor"].weights[1] * by_micro_batch[1]
    assert float(in_step) == pytest.approx(21 / 6)
    assert float(sum(by_micro_batch)) / 2 != pytest.approx(21 / 6), "what micro-batches that count the same make"


def test_a_step_of_empty_responses_weighs_nothing() -> None:
    (found,) = by_tokens([Round({"actor": part((2,))})], experience())
    assert found.parts["actor"].weights == (0.0,)


def test_reports_are_of_whole_steps_in_the_order_of_their_micro_batches() -> None:
    """The actor's two replicas end on ranks 0 and 1, the critic on rank 0."""
    placement = (Replica("actor", 0, (0,)), Replica("actor", 1, (1,)), Replica("critic", 0, (1, 0)))
    of_rounds = rounds(
        {"actor": steps(1, 1, batch_size=5), "critic": steps(2, 1, batch_size=5)},
        {"actor": 2, "critic": 1},
        is_fused=True,
    )
    assert counts(of_rounds) == [{"actor": 3, "critic": 5}, {"actor": 2, "critic": 5}]
    by_rank = []
    for rank in range(2):
        of_rank = []
        for first, one in zip((0, 3), of_rounds, strict=True):
            own = [first + index for index in replica_micro_batches(len(one.parts["actor"].micro_batches), 2, rank)]
            metrics = {"actor": [{LOSS: float(index)} for index in own]}
            if rank == 0:
                metrics["critic"] = [{LOSS: 10.0 * (1 + first)}] * 5
            norms = {"critic": float(rank)} | ({"actor": 7.0} if one.parts["actor"].is_last else {})
            of_rank.append(RankRound(metrics=metrics, gradient_norms=norms))
        by_rank.append(of_rank)
    found = step_reports(of_rounds, by_rank, placement)
    (actor,) = found["actor"]
    assert [row[LOSS] for row in actor.metrics] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert actor.gradient_norm == 7.0
    assert [[row[LOSS] for row in step.metrics] for step in found["critic"]] == [[10.0] * 5, [40.0] * 5]
    assert [step.gradient_norm for step in found["critic"]] == [1.0, 1.0]

"""PPO's ragged functions against hand-derived values."""

from __future__ import annotations

import pytest
import torch

from fuse.algorithms.batch import Segments
from fuse.algorithms.gae import _explained_variance
from fuse.algorithms.policy_loss import CLIP_FRACTION, RATIO, PolicyTargets, clipped_policy_loss, clipped_surrogate
from fuse.algorithms.value_loss import clipped_error
from fuse.micro_batch import MicroBatch
from fuse.sample import response_length

PAD, STOP = 0, 1


@pytest.mark.parametrize(
    ("response", "stop", "length"),
    [
        ([5, 6, STOP], (STOP,), 3),  # the stop token counts
        ([5, STOP, 7, STOP], (STOP,), 2),  # nothing after the first one does
        ([5, 6, 7], (STOP,), 3),
        ([5, PAD, 6, STOP], (STOP,), 1),  # a generated padding token ends what counts
        ([PAD, 5], (STOP,), 0),
        ([5, STOP, 6], (), 3),
        ([5, 7, STOP], (STOP, 7), 2),  # any of several ends it
        ([5, 6, PAD], (PAD,), 2),  # stop and padding are one token: it does not count
    ],
)
def test_response_length(response: list[int], stop: tuple[int, ...], length: int) -> None:
    assert response_length(response, stop, PAD) == length


def test_segments_give_one_value_more_than_tokens_unless_the_response_is_as_wide_as_the_batch() -> None:
    segments = Segments.from_lengths([2, 0, 3], width=3)
    assert segments.token_offsets.tolist() == [0, 2, 2, 5]
    assert segments.value_offsets.tolist() == [0, 3, 4, 7]
    assert segments.token_rows.tolist() == [0, 1, 4, 5, 6]
    assert [segments.num_values(sample) for sample in range(3)] == [3, 1, 3]


def test_policy_loss_clips_in_the_direction_of_the_advantage() -> None:
    advantages = torch.tensor([1.0, -1.0])
    mask = torch.ones(2, dtype=torch.bool)
    far = torch.tensor([2.0, 2.0]).log()  # ratio 2, clip range 0.2
    loss, metrics = clipped_surrogate(far, torch.zeros(2), advantages, mask, 0.2)
    assert loss.item() == pytest.approx((-1.2 + 2.0) / 2)
    assert metrics[CLIP_FRACTION].item() == 0.5
    assert metrics[RATIO].item() == pytest.approx(2.0)


def test_value_loss_takes_the_larger_of_clipped_and_unclipped() -> None:
    values, old_values, returns = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.0])
    loss, clip_fraction = clipped_error(values, old_values, returns, torch.ones(1, dtype=torch.bool), 0.2)
    assert loss.item() == pytest.approx(0.5 * 0.8**2)
    assert clip_fraction.item() == 1.0


def test_value_loss_without_a_clip_range_is_the_squared_error() -> None:
    values, old_values, returns = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    mask = torch.ones(2, dtype=torch.bool)
    loss, clip_fraction = clipped_error(values, old_values, returns, mask, None)
    assert loss.item() == pytest.approx(0.5 * 2.0**2 / 2)
    assert clip_fraction.item() == 0.0
    assert clipped_error(values, old_values, returns, mask, 0.2)[0].item() == pytest.approx(0.5 * (0.8**2 + 2.0**2) / 2)


def test_a_micro_batch_of_empty_responses_has_no_loss() -> None:
    empty, mask = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    loss, _ = clipped_surrogate(empty, empty, empty, mask, 0.2)
    assert loss.item() == 0.0


def test_metrics_of_a_micro_batch_of_empty_responses_are_those_of_unchanged_policies() -> None:
    """In the ragged layout it has no positions at all."""
    none = MicroBatch(
        input_ids=torch.ones(2, 3, dtype=torch.int64),
        head_index=torch.zeros(0, dtype=torch.int64),
        targets=PolicyTargets(
            token_ids=torch.zeros(0, dtype=torch.int64),
            old_logprobs=torch.zeros(0),
            advantages=torch.zeros(0),
            mask=torch.zeros(0, dtype=torch.bool),
        ),
    )
    head = torch.nn.Linear(4, 5)
    loss, metrics = clipped_policy_loss(torch.zeros(0, 4), head, none, temperature=1.0, cliprange=0.2)
    assert loss.item() == 0.0
    assert {metric.name: value.item() for metric, value in metrics.items() if value != 0} == {"val/ratio": 1.0}


@pytest.mark.parametrize(
    ("values", "explained"), [([0.0, 2.0], 1.0), ([1.0, 1.0], 0.0), ([5.0, 7.0], 1.0), ([2.0, 0.0], -3.0)]
)
def test_a_critic_explains_what_it_knew_of_the_returns(values: list[float], explained: float) -> None:
    """A constant error is none of variance; the wrong way round is worse than a constant."""
    found = _explained_variance(torch.tensor(values), torch.tensor([0.0, 2.0]))
    assert found == {"critic/explained_variance": pytest.approx(explained)}
    assert _explained_variance(torch.tensor(values), torch.tensor([2.0, 2.0])) == {}, "nothing to explain"

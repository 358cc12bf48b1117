"""Pairs and losses of online DPO: by hand, and against the peers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuse.algorithms.online_dpo_loss import (
    ACCURACY,
    CHOSEN_REWARD,
    MARGIN,
    REJECTED_REWARD,
    Pairs,
    best_and_worst,
    dpo_loss,
)

NAN = math.nan


def rows(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def test_pairs_are_the_best_and_the_worst_of_each_group() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, -1.0, -3.0, -2.0])
    assert rows(best_and_worst(scores, 3)) == [(1, 0), (3, 4)]


def test_of_equal_scores_the_first_counts() -> None:
    assert rows(best_and_worst(torch.tensor([1.0, 2, 2, 1, 7, 7, 7, 7]), 4)) == [(1, 0), (4, 4)]


def test_missing_scores_are_in_no_pair() -> None:
    scores = torch.tensor([NAN, 0.9, 0.5, NAN, NAN, NAN, -3.0, NAN, -2.0])
    assert rows(best_and_worst(scores, 3)) == [(1, 2), (8, 6)]


def test_losses_by_hand() -> None:
    # Log-ratios to the reference 1, -1, 0; beta 1/2. Differences 2 and -1, logits 1 and -1/2.
    logprobs, reference = torch.tensor([-4.0, -7.0, -5.0]), torch.tensor([-5.0, -6.0, -5.0])
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 2]))
    loss, metrics = dpo_loss(logprobs, reference, pairs, beta=0.5)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 2)
    assert {metric.name: value.item() for metric, value in metrics.items()} == {
        ACCURACY.name: 0.5,
        CHOSEN_REWARD.name: 0,
        REJECTED_REWARD.name: -0.25,
        MARGIN.name: 0.25,
    }
    ipo, _ = dpo_loss(logprobs, reference, pairs, beta=0.5, form="ipo")
    assert ipo.item() == pytest.approx(((2 - 1) ** 2 + (-1 - 1) ** 2) / 2)


def test_gradient_by_hand() -> None:
    # d/dx of -log sigmoid(beta x) is -beta sigmoid(-beta x); for equal policies -beta / 2, over two pairs.
    logprobs = torch.zeros(4, requires_grad=True)
    loss, _ = dpo_loss(logprobs, torch.zeros(4), Pairs(torch.tensor([0, 2]), torch.tensor([1, 3])), beta=0.1)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.0, 1, -1, 1]) * 0.025)


def test_a_pair_of_one_sample_has_no_gradient() -> None:
    logprobs = torch.zeros(2, requires_grad=True)
    loss, _ = dpo_loss(logprobs, torch.zeros(2), best_and_worst(torch.ones(2), 2), beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
def test_no_pairs_are_no_loss_and_no_gradient(form: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    logprobs = torch.zeros(2, requires_grad=True)
    loss, metrics = dpo_loss(logprobs, torch.zeros(2), Pairs(none, none), beta=0.1, form=form)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0
    assert not any(metrics.values())
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def peer_loss(
    token_logprobs: Tensor,
    reference: Tensor,
    padding: Tensor,
    scores: Tensor,
    num_generations: int,
    beta: float,
    form: str,
) -> Tensor:
    """async_rlhf's loss, and TRL's for two responses, one group after the other; token tensors [samples, width]."""
    losses = []
    for first in range(0, len(scores), num_generations):
        group = range(first, first + num_generations)
        chosen = max(group, key=lambda sample: scores[sample].item())
        rejected = min(group, key=lambda sample: scores[sample].item())
        sums = {
            name: [(tensor[sample] * ~padding[sample]).sum() for sample in (chosen, rejected)]
            for name, tensor in (("policy", token_logprobs), ("reference", reference))
        }
        logits = (sums["policy"][0] - sums["policy"][1]) - (sums["reference"][0] - sums["reference"][1])
        if form == "sigmoid":
            losses.append(-torch.nn.functional.logsigmoid(beta * logits))
        else:
            losses.append((logits - 1 / (2 * beta)) ** 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("num_generations", [2, 4])
@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
def test_equals_the_peers(form: str, num_generations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    token_logprobs, reference = -torch.rand(2, 8, 5, generator=generator, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([5, 3, 1, 2, 4, 5, 0, 3])[:, None]
    scores = torch.randn(8, generator=generator)
    token_logprobs.requires_grad_()
    expected = peer_loss(token_logprobs, reference, padding, scores, num_generations, 0.1, form)
    expected_gradient = torch.autograd.grad(expected, token_logprobs)[0]

    sums, reference_sums = (tensor.masked_fill(padding, 0.0).sum(1) for tensor in (token_logprobs, reference))
    loss, _ = dpo_loss(sums, reference_sums, best_and_worst(scores, num_generations), beta=0.1, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, token_logprobs)[0], expected_gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0.0}, "beta is 0.0"), ({"beta": 0.1, "form": "hinge"}, "the form of the loss is 'hinge'")],
)
def test_refuses_what_makes_no_sense(options: dict[str, object], message: str) -> None:
    pair = Pairs(torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(2), torch.zeros(2), pair, **options)  # type: ignore[arg-type]


def test_refuses_groups_that_are_not_whole() -> None:
    with pytest.raises(ValueError, match="not whole groups of 2"):
        best_and_worst(torch.zeros(3), 2)

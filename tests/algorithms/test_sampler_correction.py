"""A loss over several steps weights samples by the trainer's probabilities of before the first, over the sampler's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.sampler_correction import CorrectionSettings
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.micro_batch import Metric, MicroBatch

LENGTHS = (3, 2)


def loss_of(mode: Any, *, shift: float, drift: float) -> tuple[float, dict[str, float]]:
    """shift: how far log-probabilities of the sampler are below the old ones. drift: how far those below the new."""
    head, hidden, now = model()
    num_tokens = sum(LENGTHS)
    old = now - drift
    targets = GroupTargets(
        token_ids=torch.arange(num_tokens) % 8,
        sampler_logprobs=old - shift,
        old_logprobs=old,
        reference_logprobs=torch.zeros(num_tokens),
        advantages=torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5]),
        batch_weights=torch.full((num_tokens,), 1 / num_tokens),
        mask=torch.ones(num_tokens, dtype=torch.bool),
    )
    correction = None if mode is None else CorrectionSettings(mode=mode, least=None, most=1.5)
    settings = GRPOLossSettings(
        temperature=1.0,
        loss_type="bnpo",
        level="token",
        surrogate=SurrogateSettings(epsilon_low=0.2, epsilon_high=0.2),
        beta=0.0,
        weighs_kl=False,
        is_on_policy=False,
        max_tokens=4,
        micro_batches_per_rollout=1,
        correction=correction,
    )
    rows = [row * 4 + position for row, length in enumerate(LENGTHS) for position in range(length)]
    micro_batch = MicroBatch(
        input_ids=torch.zeros(2, 4, dtype=torch.int64), head_index=torch.tensor(rows), targets=targets
    )
    loss, metrics = grpo_loss(hidden, head, micro_batch, settings=settings)
    return loss.item(), {metric.name: float(value) for metric, value in metrics.items()}


@cache
def model() -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states and log-probabilities of the tokens."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 8, bias=False), torch.randn(sum(LENGTHS), 4)
    logprobs = head(hidden).log_softmax(-1).gather(1, (torch.arange(sum(LENGTHS)) % 8)[:, None]).squeeze(1).detach()
    return head, hidden, logprobs


@pytest.mark.parametrize(
    ("mode", "shift", "ratios"),
    [
        ("token_truncate", 0.1, [torch.tensor(0.1).exp()] * 5),
        ("token_truncate", 0.7, [1.5] * 5),
        ("token_mask", 0.7, [0.0] * 5),
        ("sequence_truncate", 0.1, [torch.tensor(0.3).exp()] * 3 + [torch.tensor(0.2).exp()] * 2),
        ("sequence_mask", 0.2, [0.0] * 3 + [torch.tensor(0.4).exp()] * 2),
    ],
)
def test_weights_are_of_before_the_first_step(mode: str, shift: float, ratios: list[Any]) -> None:
    """Whatever the weights have become since, which only the ratio of the surrogate tells."""
    for drift in (0.0, 0.1):
        loss, metrics = loss_of(mode, shift=shift, drift=drift)
        weights = torch.tensor([float(one) for one in ratios])
        advantages, ratio = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5]), torch.tensor(drift).exp()
        assert loss == pytest.approx(float(-(advantages * ratio * weights).mean()), abs=1e-5)
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(weights.mean()), abs=1e-5)
        assert Metric("sampling/importance_sampling_ratio/max", "max").name in metrics
    plain, _ = loss_of(None, shift=shift, drift=0.1)
    assert plain == loss_of(None, shift=0.0, drift=0.1)[0], "without correction the sampler's enter nothing"

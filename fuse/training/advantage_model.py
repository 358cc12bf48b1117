"""The Advantage Model: what a response is worth beyond what its prompt lets expect (arXiv 2309.10202).

A sequence classifier with two labels, of these names. With r and e its outputs, a response y to a prompt x scores

    a(x, y) = r(last token of y) - e(last token of x)

so that scores of all prompts are about zero on average, and comparable. The paper's text was not at hand: that a second
head says what is expected is known from secondary sources, where it looks is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from fuse.micro_batch import MicroBatch
from fuse.training.reading import Reading, TokenSequence

REWARD, EXPECTED_REWARD = 0, 1
LABELS: Mapping[int, str] = MappingProxyType({REWARD: "reward", EXPECTED_REWARD: "expected_reward"})
"""`id2label` of its configuration, by which it is told from other classifiers."""


def is_advantage_model(config: PretrainedConfig) -> bool:
    """Whether a classifier of this configuration is one."""
    return dict(config.id2label or {}) == LABELS


def _rows(sequence: TokenSequence) -> tuple[int, int]:
    return len(sequence.prompt_ids) - 1, len(sequence) - 1


def _outputs(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Of each sequence e at its first row, and r at its second."""
    outputs: Tensor = head(hidden).float()
    return torch.stack((outputs[0::2, EXPECTED_REWARD], outputs[1::2, REWARD]), dim=-1).flatten()


def _difference(of_one: NDArray[np.float32]) -> float:
    expected, reward = of_one
    return float(reward - expected)


ADVANTAGE = Reading(_rows, _outputs, _difference)

"""The batch on which layers and heads are measured."""

from __future__ import annotations

from itertools import pairwise

from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.training import layer_costs
from fuse.training.layer_costs import TypicalBatch
from fuse.training.micro_batches import ragged

TARGETS = {"actor": PolicyTargets, "critic": ValueTargets}


def test_layers_see_padding_and_heads_do_not() -> None:
    experience = layer_costs._experience(TypicalBatch(num_sequences=4, prompt_tokens=3, response_tokens=8), 50, TARGETS)
    assert experience.lengths == (2, 4, 6, 8)
    made = ragged(experience, range(4), 1.0)
    actor, critic = made["actor"], made["critic"]
    assert actor.input_ids.shape == critic.input_ids.shape == (4, 3 + 8)
    assert len(actor.targets.token_ids) == 2 + 4 + 6 + 8


def test_short_responses_have_a_token() -> None:
    lengths = layer_costs._experience(TypicalBatch(8, 3, 1), 50, TARGETS).lengths
    assert lengths == (1,) * 8
    spread = layer_costs._experience(TypicalBatch(5, 3, 7), 50, TARGETS).lengths
    assert spread[-1] == 7
    assert all(0 < one <= other for one, other in pairwise(spread))
    assert layer_costs._experience(TypicalBatch(1, 3, 7), 50, TARGETS).lengths == (7,)

"""Text beside samples in optimizer steps: weights are those of a plain loop over one whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fuse.algorithms.batch import Targets
from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place
from fuse.trainers.metrics import reduce_metrics
from fuse.training.auxiliary import Text, text_batches
from fuse.training.layout import RaggedLayout
from fuse.training.steps import OptimizerStep

from .test_regrouping import LOSSES, MODELS, VOCABULARY, experience, permuted, trained

COEF = 0.7
ROUNDING = 1e-4
"""After steps of 1e-2, of biases of keys, whose gradients are nothing but rounding; of others a tenth."""
LENGTHS = (5, 2, 9, 3, 3, 12, 2)


def texts(seed: int) -> list[Text]:
    """Of some all tokens are learnt, of others the last ones."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist())
        made.append(Text(ids, tuple(range(1 if index % 2 else length // 2 + 1, length)) or (length - 1,)))
    return made


def with_texts(steps: Sequence[OptimizerStep], most_rows: int) -> list[OptimizerStep]:
    return [
        replace(step, auxiliary=text_batches(texts(number), most_rows=most_rows, coef=COEF))
        for number, step in enumerate(steps)
    ]


def by_hand(steps: Sequence[OptimizerStep], loss: Any, kind: type[Targets]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after these steps, each followed by text, and the losses of the text: one model, one row at a time."""
    model = copy.deepcopy(MODELS["actor"]).train(False)
    of, adamw, text_losses = experience(actor=kind), AdamWConfig(), []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
    )
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        for samples in step.micro_batches:
            micro_batch = RaggedLayout().micro_batches(of, samples, step.weight)["actor"]
            hidden = model.model(micro_batch.input_ids).last_hidden_state
            loss(micro_batch.selected(hidden), model.lm_head, micro_batch)[0].backward()
        rows = texts(number)
        num_learnt = sum(len(row.learnt) for row in rows)
        total = 0.0
        for row in rows:
            logits = model(torch.tensor([row.input_ids])).logits[0]
            places = torch.tensor(row.learnt)
            summed = cross_entropy(logits[places - 1], torch.tensor(row.input_ids)[places], reduction="sum")
            (COEF * summed / num_learnt).backward()
            total += float(summed.detach())
        text_losses.append(total / num_learnt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict(), text_losses


POLICY, GROUPS, CRITIC = (PolicyTargets, "policy"), (GroupTargets, "GRPO bnpo"), place("critic", 2, 1)


@pytest.mark.parametrize("regroups", [False, True])
@pytest.mark.parametrize(
    ("placement", "algorithm", "num_steps"),
    [
        pytest.param(place("actor", 1, 1), GROUPS, 2, id="one device"),
        pytest.param((*place("actor", 2, 2), *CRITIC), POLICY, 1, id="two stages, and a critic that takes two steps"),
        pytest.param(with_opposites(place("actor", 2, 2)), GROUPS, 2, id="opposite replicas"),
    ],
)
def test_weights_are_those_of_one_model_in_one_process(
    placement: tuple[Replica, ...], algorithm: tuple[type[Targets], str], num_steps: int, regroups: bool
) -> None:
    kind, name = algorithm
    loss, drawn = LOSSES[name][0], permuted(num_steps, 1)
    expected, text_losses = by_hand(drawn, loss, kind)
    steps: dict[str, Sequence[OptimizerStep]] = {"actor": with_texts(drawn, most_rows=2)}
    losses, kinds = {"actor": loss}, {"actor": kind}
    if len({replica.model for replica in placement}) > 1:
        steps["critic"], losses["critic"], kinds["critic"] = permuted(2, 1), LOSSES["value"][0], ValueTargets
    weights, reports = trained(steps, losses, kinds, placement, regroups=regroups)
    found: Mapping[str, Tensor] = {
        key.removeprefix("actor: "): one for key, one in weights.items() if key.startswith("actor")
    }
    assert found.keys() <= expected.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=ROUNDING, msg=lambda text, n=key: f"{n}: {text}")
    for report, text_loss in zip(reports["actor"], text_losses, strict=True):
        assert reduce_metrics({"actor": [report]})["auxiliary/loss"] == pytest.approx(text_loss, rel=1e-4)


def test_rows_are_dealt_by_length_into_as_many_micro_batches_whatever_they_are() -> None:
    batches = text_batches(texts(0), most_rows=3, coef=1.0)
    assert [[len(row.input_ids) for row in batch.rows] for batch in batches] == [[2, 2, 3, 3], [5, 9], [12]]
    assert max(batch.shape(packs=False).size for batch in batches) == 18 < 3 * 12
    assert {batch.weight for batch in batches} == {1 / sum(len(row.learnt) for row in texts(0))}

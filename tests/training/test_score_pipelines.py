"""Scores that come out of pipelines have the bits that whole copies compute, and devices hold no more than their share.

In worlds of threads under NCCL's rules of waiting. Worlds of processes: tests/workers/test_score_flow.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fuse.driver.memory import ledger
from fuse.driver.model_size import ModelSize
from fuse.intrastage.layer_range import even_layer_range
from fuse.intrastage.packing import use_packing
from fuse.intrastage.placement import Replica, place
from fuse.trace import Span, SpanRecorder
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank
from fuse.training.reading import TokenSequence
from fuse.training.score_pipelines import Piece, ScorePipelines, kind_of
from fuse.training.scoring import MicroBatchLimit, ScoringSettings, inferences, score

from ..distributed.fake_nccl import FakeNccl
from ..memory_setups import memory_setup
from ..tiny_models import advantage_model, build, classifier, language_model, spread
from .test_rank import SETTINGS

CPU = torch.device("cpu")
LAYERS: Mapping[str, Any] = {"num_hidden_layers": 5}
MODELS = {
    "actor": spread(build(language_model("qwen2", **LAYERS, tie_word_embeddings=True))),
    "critic": spread(build(classifier(**LAYERS))),
    "reference": spread(build(language_model("qwen2", **LAYERS, tie_word_embeddings=True), seed=2)),
    "reward": spread(build(classifier("gpt_neox", num_hidden_layers=3), seed=3)),
    "reward_1": spread(build(advantage_model(num_hidden_layers=3), seed=4)),
}
TRAINED = ("actor", "critic")
SCORING = ("critic", "reference", "reward", "reward_1")
LIMIT = MicroBatchLimit(max_samples=3, max_tokens=40)


def scoring_settings(autocast: torch.dtype | None = None) -> ScoringSettings:
    return ScoringSettings(temperature=0.7, limit=LIMIT, autocast=autocast, num_tokens=60, is_sharded=True)


@cache
def pieces() -> list[list[TokenSequence]]:
    """Of one micro-batch and of many; a reward model reads some in its own tokens."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return list(map(int, generator.integers(0, 60, count)))

    lengths = [[(3, 4)], [(1, 9), (7, 1), (2, 0), (30, 20), (4, 4), (5, 6), (1, 1)], [(4, 2), (4, 3)], [(2, 2)] * 9]
    ids = itertools.count()
    made = [[TokenSequence(draw(a), draw(b), sample_id=next(ids)) for a, b in one] for one in lengths]
    own = {"reward": (draw(11), draw(3)), "reward_1": (draw(4), draw(5))}
    made[2][0] = replace(made[2][0], rewarded_ids=own)
    return made


@cache
def scored(
    num_devices: int,
    placement: tuple[Replica, ...],
    roles: tuple[str, ...],
    *,
    slots: int = 0,
    autocast: torch.dtype | None = None,
) -> tuple[list[dict[str, list[Any]]], list[dict[str, int]]]:
    """By piece and role what pipelines say; by device, the bytes of each share. Nobody changes them."""

    def run(device: int) -> tuple[list[Any], dict[str, int], list[Span]]:
        specs = {role: ModelSpec.of(MODELS[role]) for role in MODELS}
        trained = {role: specs[role] for role in TRAINED}
        recorder = SpanRecorder()
        training = TrainingRank(device, CPU, trained, placement, SETTINGS, recorder)
        dtype = autocast or torch.float32
        shares = {role: (specs[role], dtype) for role in roles if role not in TRAINED}
        pipelines = ScorePipelines(
            device, num_devices, CPU, shares, training, scoring_settings(autocast), recorder, SETTINGS.timeout_s
        )
        for role in TRAINED:
            training.load_weights(role, MODELS[role].state_dict())
        for role, share in pipelines.shares.items():
            share.load_state_dict(MODELS[role].state_dict())
        sent = [Piece(number, tuple(roles), tuple(piece)) for number, piece in enumerate(pieces())]
        found = [one for piece in (*sent[:2], None, *sent[2:], None, None) for one in pipelines.advance(piece)]
        spans = recorder.drain()
        assert {span.category for span in spans} <= {"infer", "logprobs"}
        for share in pipelines.shares.values():
            assert not any(parameter.requires_grad for parameter in share.model.parameters())
        held = {
            role: sum(parameter.nbytes for parameter in share.model.parameters())
            for role, share in pipelines.shares.items()
        }
        return found, held, spans

    by_device = FakeNccl(num_devices, slots).run(run)
    results: list[dict[str, list[Any]]] = [{role: [None] * len(piece) for role in roles} for piece in pieces()]
    for found, _, _ in by_device:
        for one in found:
            for index, result in zip(one.indices, one.results, strict=True):
                known = results[one.piece][one.role]
                assert known[index] is None, "it is told twice"
                known[index] = result
    first_stages = [span for _, _, spans in by_device for span in spans if span.arguments["stage"] == 0]
    for role in roles:
        told = [one for span in first_stages if span.name == role for one in span.arguments["sample_ids"]]
        assert sorted(told) == [one.sample_id for piece in pieces() for one in piece], "every sample enters once"
    return results, [held for _, held, _ in by_device]


@cache
def copy_of(role: str) -> PreTrainedModel:
    """As a model worker has it."""
    copy = ModelSpec.of(MODELS[role]).build(torch.device("cpu"), torch.float32)
    copy.load_state_dict(MODELS[role].state_dict())
    use_packing(copy, "cpu")
    return copy


@cache
def by_whole_copies(role: str, number: int) -> Sequence[Any]:
    """Of a piece."""
    return score(kind_of(role), copy_of(role), [one.read_by(role) for one in pieces()[number]], scoring_settings())


LAYOUTS: dict[str, tuple[int, tuple[Replica, ...]]] = {
    "one device": (1, (*place("actor", 1, 1), *place("critic", 1, 1))),
    "two devices": (2, (*place("actor", 2, 2), *place("critic", 2, 2, reverse=True))),
    "four devices": (4, (*place("actor", 4, 4), *place("critic", 4, 4, reverse=True))),
    "replicas": (4, (*place("actor", 4, 1), *place("critic", 4, 2, reverse=True))),
    "virtual stages, cut unevenly": (
        2,
        (Replica("actor", 0, (0, 1, 0, 1), ((0, 2), (2, 3), (3, 3), (3, 5))), Replica("critic", 0, (1,))),
    ),
}


@pytest.mark.parametrize("slots", [0, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_have_the_bits_of_whole_copies(layout: str, slots: int) -> None:
    num_devices, placement = LAYOUTS[layout]
    results, _ = scored(num_devices, placement, SCORING, slots=slots)
    assert len(results) == len(pieces())
    for number, of_piece in enumerate(results):
        for role in SCORING:
            for found, expected in zip(of_piece[role], by_whole_copies(role, number), strict=True):
                np.testing.assert_array_equal(found, expected)
        pairs = zip(of_piece["reward"], of_piece["reward_1"], strict=True)
        assert [one.scores for one in inferences(of_piece)] == [{"reward": a, "reward_1": b} for a, b in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_trains_tells_log_probabilities_through_its_stages(layout: str) -> None:
    """Those of its weights as they are, to the bit, whatever its layout."""
    num_devices, placement = LAYOUTS[layout]
    results, held = scored(num_devices, placement, ("actor",))
    assert held == [{}] * num_devices
    assert len(results) == len(pieces())
    for number, of_piece in enumerate(results):
        for found, expected in zip(of_piece["actor"], by_whole_copies("actor", number), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_shares_may_be_rounded() -> None:
    num_devices, placement = LAYOUTS["two devices"]
    rounded, held = scored(num_devices, placement, SCORING, autocast=torch.bfloat16)
    exact, whole = scored(num_devices, placement, SCORING, slots=0)
    assert [{role: 2 * one for role, one in of_device.items()} for of_device in held] == whole
    for role in ("reference", "reward"):
        one, other = (np.concatenate([np.ravel(a) for of in each for a in of[role]]) for each in (rounded, exact))
        assert 0 < np.abs(one - other).max() < 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_hold_the_shares_that_the_ledger_has(layout: str) -> None:
    """The critic has none, and together they are the models, with a second copy of a tied embedding."""
    num_devices, placement = LAYOUTS[layout]
    _, held = scored(num_devices, placement, SCORING, slots=0)
    specs = {role: ModelSpec.of(model) for role, model in MODELS.items()}
    sizes = {role: ModelSize.of(spec) for role, spec in specs.items()}
    setup = memory_setup(specs, placement, num_devices, scoring="sharded")
    planned = ledger(setup, plans_fusion=False)
    for device, shares in enumerate(held):
        told = {one.role: max(one.bytes.values()) for one in planned.devices[device] if one.what == "scoring share"}
        assert shares == told
        for role, size in sizes.items():
            if role in shares:
                own = even_layer_range(len(size.layers), device, num_devices)
                assert shares[role] == 4 * size.stage(device, num_devices, own)
        assert not [one for one in planned.devices[device] if one.what == "scoring copy"]
    tied = 4 * sizes["reference"].tied * (num_devices > 1)
    assert sum(one["reference"] for one in held) == 4 * sizes["reference"].total + tied
    assert sum(one["reward"] for one in held) == 4 * sizes["reward"].total

"""Scores of ragged sequences equal the model's own, one sequence at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fuse.training.reading import TokenSequence
from fuse.training.scoring import (
    MicroBatchLimit,
    mean_hidden_states,
    micro_batches,
    reference_logprobs,
    scores,
    values,
)

from ..tiny_models import ModelKind, advantage_model, build, classifier, language_model, spread

SMALL = MicroBatchLimit(max_samples=3, max_tokens=40)


def ready(kind: ModelKind) -> PreTrainedModel:
    model: PreTrainedModel = spread(build(kind), std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    lengths = [(3, 4), (1, 9), (7, 1), (2, 0), (30, 20), (4, 4), (5, 6), (1, 1)]
    return [
        TokenSequence(generator.integers(0, 50, prompt).tolist(), generator.integers(0, 50, response).tolist())
        for prompt, response in lengths
    ]


@pytest.mark.parametrize(
    "kind",
    [
        language_model(),
        language_model("qwen2", tie_word_embeddings=True),
    ],
    ids=["llama", "qwen2"],
)
@pytest.mark.parametrize("limit", [SMALL, MicroBatchLimit()], ids=["small", "default"])
def test_logprobs_are_those_of_each_sequence_alone(
    kind: ModelKind, limit: MicroBatchLimit, sequences: list[TokenSequence]
) -> None:
    model = ready(kind)
    for got, sequence in zip(reference_logprobs(model, sequences, 0.7, limit=limit), sequences, strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        logits = model(ids).logits[0] / 0.7
        first = len(sequence.prompt_ids) - 1
        expected = [logits[first + t].log_softmax(-1)[token].item() for t, token in enumerate(sequence.response_ids)]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        classifier(),
        classifier("gpt_neox"),
    ],
    ids=["llama", "neox"],
)
def test_values_and_scores_are_those_of_each_sequence_alone(kind: ModelKind, sequences: list[TokenSequence]) -> None:
    model = ready(kind)
    got_values = values(model, sequences, limit=SMALL)
    got_scores = scores(model, sequences, limit=SMALL)
    for value, score, sequence in zip(got_values, got_scores, sequences, strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        every = model.score(model.base_model(ids).last_hidden_state)[0, :, 0].detach().numpy()
        first = len(sequence.prompt_ids) - 1
        assert len(value) == len(sequence.response_ids) + 1
        np.testing.assert_allclose(value, every[first : first + len(value)], atol=1e-5)
        assert score == pytest.approx(every[-1], abs=1e-5)


def test_an_advantage_is_the_reward_less_what_the_prompt_lets_expect(sequences: list[TokenSequence]) -> None:
    model = ready(advantage_model())
    for got, sequence in zip(scores(model, sequences, limit=SMALL), sequences, strict=True):
        reward, _ = model(torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])).logits[0].tolist()
        _, expected = model(torch.tensor([[*sequence.prompt_ids]])).logits[0].tolist()
        assert got == pytest.approx(reward - expected, abs=1e-5)


def test_hidden_states_are_averaged_over_each_sequence_alone(sequences: list[TokenSequence]) -> None:
    model = ready(language_model())
    for got, sequence in zip(mean_hidden_states(model, sequences, limit=SMALL), sequences, strict=True):
        hidden = model.base_model(torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])).last_hidden_state[0]
        np.testing.assert_allclose(got, hidden.mean(dim=0).detach().numpy(), atol=1e-5)


def test_bfloat16_is_near_and_not_equal(sequences: list[TokenSequence]) -> None:
    model = ready(language_model())
    exact = np.concatenate(reference_logprobs(model, sequences, 1.0))
    rounded = np.concatenate(reference_logprobs(model, sequences, 1.0, autocast=torch.bfloat16))
    assert 0 < np.abs(exact - rounded).max() < 0.5
    assert rounded.dtype == np.float32


def test_no_sequences_give_no_results() -> None:
    model = ready(language_model())
    assert reference_logprobs(model, [], 1.0) == []


def test_a_reward_model_with_several_outputs_is_refused(sequences: list[TokenSequence]) -> None:
    model = ready(classifier(num_labels=2))
    with pytest.raises(ValueError, match=r"gives 2 scores per token .*num_labels=1"):
        scores(model, sequences)


def test_micro_batches_keep_within_samples_and_padded_tokens() -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 30, 200).tolist()
    batches = list(micro_batches([*lengths, 500], MicroBatchLimit(max_samples=8, max_tokens=100)))
    assert sorted(index for batch in batches for index in batch) == list(range(201))
    assert batches[0] == [200]
    for batch in batches[1:]:
        assert len(batch) <= 8
        assert len(batch) * max(lengths[index] for index in batch) <= 100
    assert all(lengths[batch[0]] >= lengths[following[0]] for batch, following in pairwise(batches[1:]))


def test_micro_batches_pad_little_and_are_few() -> None:
    """One long sequence among many short ones is scored alone; sequences of one length together."""
    limit = MicroBatchLimit(max_samples=64, max_tokens=16384)
    assert list(micro_batches([20] * 40, limit)) == [list(range(40))]
    assert [len(batch) for batch in micro_batches([20] * 30 + [500] + [20] * 10, limit)] == [1, 40]
    assert [len(batch) for batch in micro_batches([20, 21, 19, 20], limit)] == [4]
    assert list(micro_batches([], limit)) == []

"""Engines, copies that score and stages that train agree in bfloat16, far into a sequence and under peaked attention.

There an angle of rotary embeddings that is off turns attention to other tokens: its error grows with the distance.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fuse.commands.models import load_classifier, load_policy
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.state_dict import adopt_state_dict
from fuse.training.model_spec import ModelSpec
from fuse.training.reading import TokenSequence
from fuse.training.scoring import reference_logprobs

from ..tiny_models import build, classifier, language_model, spread

NUM_PROMPT, NUM_RESPONSE = 1992, 16
KIND = language_model(hidden_size=64, intermediate_size=96, num_attention_heads=2, max_position_embeddings=2048)
SHARPNESS = 2.0
TOLERANCE = 0.1
"""Nats, in the mean over the response: rounding alone makes a fraction of it, wrong angles several times as much."""

Logprobs = NDArray[np.float32]


@pytest.fixture(scope="module")
def policy() -> Any:
    """Of weights that bfloat16 holds exactly, with queries and keys scaled up."""
    model = spread(build(KIND), std=0.15)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= SHARPNESS
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            nn.init.ones_(norm.weight)
    nn.init.ones_(model.model.norm.weight)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def prompt() -> tuple[int, ...]:
    return tuple(torch.randint(0, 64, (NUM_PROMPT,), generator=torch.Generator().manual_seed(7)).tolist())


def rounded_copy(policy: Any, *, buffers_too: bool = False) -> Any:
    """As workers build one in bfloat16; buffers_too: as they must not."""
    built: Any = ModelSpec.of(policy).build(torch.device("cpu"), torch.bfloat16)
    adopt_state_dict(built, policy.state_dict())
    return built.to(torch.bfloat16) if buffers_too else built


def generated(model: Any, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], Logprobs]:
    """A response by the engine, and what it says of it."""
    engine = TransformersEngine(model, max_batch=2)
    params = SamplingParams(seed=3, temperature=1.0, max_new_tokens=NUM_RESPONSE)
    engine.submit(GenerationRequest(sample_id=0, prompt_ids=prompt, params=params))
    tokens = [token for _ in range(NUM_RESPONSE) for token in engine.step()]
    return tuple(one.token_id for one in tokens), np.array([one.logprob for one in tokens], dtype=np.float32)


def scored(model: Any, sequence: TokenSequence, autocast: torch.dtype | None) -> Logprobs:
    return reference_logprobs(model, [sequence], 1.0, autocast=autocast)[0]


def trained(policy: Any, sequence: TokenSequence) -> Logprobs:
    """By two stages with float32 weights that compute in bfloat16."""
    said: list[Tensor] = []

    def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        logprobs, _ = token_logprobs(hidden, head, micro_batch.targets, 1.0)
        said.append(logprobs.detach())
        return logprobs.mean(), {}

    tokens = (*sequence.prompt_ids, *sequence.response_ids)
    batch = MicroBatch(
        input_ids=torch.tensor([tokens]),
        head_index=torch.arange(NUM_PROMPT - 1, len(tokens) - 1),
        targets=torch.tensor(sequence.response_ids),
    )
    hidden = None
    for stage in range(2):
        made: Any = TransformersStage(*KIND, stage=stage, num_stages=2, loss=loss, autocast=torch.bfloat16)
        made.load_state_dict(policy.state_dict())
        hidden = made.forward(0, batch, hidden)
    return said[0].numpy()


def distance(one: Logprobs, other: Logprobs) -> float:
    return float(np.abs(one - other).mean())


def test_all_say_the_same_two_thousand_tokens_on(policy: Any, prompt: tuple[int, ...]) -> None:
    response, by_engine = generated(rounded_copy(policy), prompt)
    sequence = TokenSequence(prompt, response)
    exact = scored(policy, sequence, None)
    for said in (by_engine, scored(rounded_copy(policy), sequence, torch.bfloat16), trained(policy, sequence)):
        assert len(said) == NUM_RESPONSE
        assert distance(said, exact) < TOLERANCE
        assert distance(said, by_engine) < TOLERANCE / 4


def test_rounded_frequencies_would_show(policy: Any, prompt: tuple[int, ...]) -> None:
    response, by_engine = generated(rounded_copy(policy, buffers_too=True), prompt)
    sequence = TokenSequence(prompt, response)
    exact = scored(policy, sequence, None)
    for said in (by_engine, scored(rounded_copy(policy, buffers_too=True), sequence, torch.bfloat16)):
        assert distance(said, exact) > 3 * TOLERANCE


def test_models_read_in_bfloat16_have_exact_frequencies(policy: Any, tmp_path: Path) -> None:
    for name, model, load in (
        ("policy", policy, load_policy),
        ("classifier", build(classifier(max_position_embeddings=2048)), load_classifier),
    ):
        expected = model.model.rotary_emb.inv_freq
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / name)
        loaded: Any = load(str(tmp_path / name))
        assert loaded.dtype is torch.bfloat16
        assert torch.equal(loaded.model.rotary_emb.inv_freq, expected)

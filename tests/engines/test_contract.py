"""What every generation engine must do: one suite, run on each of them.

Batches are of 2, 16 or 1, in this order, for some engines take seconds to start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fuse.engines.engine import (
    Evicted,
    GenerationEngine,
    GenerationRequest,
    SamplingParams,
)
from fuse.engines.replay import ReplayEngine
from fuse.engines.transformers import TransformersEngine

from .driving import Outputs, assert_same, collect, run
from .vllm_pool import VllmPool

MAX_CONTEXT = 96
STOP_TOKEN_ID = 5
HIDDEN_SIZE = 128  # 4 heads of 32: vLLM on CPUs serves none smaller

# (requests it will be given, max_batch) -> an engine; engines made in one test share their weights or recordings.
MakeEngine = Callable[[Sequence[GenerationRequest], int], GenerationEngine]


def request(
    sample_id: int, *, max_new_tokens: int = 20, num_prompt_tokens: int | None = None, stop: bool = False
) -> GenerationRequest:
    length = 1 + 3 * sample_id % 17 if num_prompt_tokens is None else num_prompt_tokens
    return GenerationRequest(
        sample_id=sample_id,
        prompt_ids=tuple(1 + (sample_id + 5 * index) % 90 for index in range(length)),
        params=SamplingParams(
            seed=3, temperature=1.0, max_new_tokens=max_new_tokens, stop_token_ids=(STOP_TOKEN_ID,) if stop else ()
        ),
    )


RAGGED = [request(sample_id, max_new_tokens=4 + 7 * sample_id % 23) for sample_id in range(9)]

FILTERS: list[dict[str, Any]] = [
    {"top_k": 6},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.0, "repetition_penalty": 2.0},
]
FILTERED = [
    replace(one, params=replace(one.params, max_new_tokens=7 + 5 * index, **FILTERS[index % len(FILTERS)]))
    for index, one in enumerate(RAGGED)
]
"""A batch of all filters side by side, and of samples without any."""
WITH_AND_WITHOUT = pytest.mark.parametrize("requests", [RAGGED, FILTERED], ids=["unfiltered", "filtered"])


def record(recorded: GenerationRequest) -> tuple[list[int], list[float]]:
    """A made-up response that obeys the request's limits."""
    response_ids: list[int] = []
    for position in range(recorded.params.max_new_tokens):
        response_ids.append((recorded.sample_id + 3 * position) % 11)
        if response_ids[-1] in recorded.params.stop_token_ids:
            break
    return response_ids, [-0.1 * (1 + token_id) for token_id in response_ids]


VLLM = pytest.param("vllm", marks=pytest.mark.processes)


@pytest.fixture(params=["replay", "transformers", VLLM])
def make_engine(request: pytest.FixtureRequest, build_model: Callable[..., PreTrainedModel]) -> MakeEngine:
    limits = {"max_context": MAX_CONTEXT, "max_prefill_tokens": 40}

    def replay(requests: Sequence[GenerationRequest], max_batch: int) -> GenerationEngine:
        recordings = {one.sample_id: record(replace(one, response_ids=(), logprobs=())) for one in requests}
        return ReplayEngine(recordings, max_batch=max_batch)

    def transformers(_: Sequence[GenerationRequest], max_batch: int) -> GenerationEngine:
        return TransformersEngine(build_model(hidden_size=HIDDEN_SIZE), max_batch=max_batch, **limits)

    def vllm(_: Sequence[GenerationRequest], max_batch: int) -> GenerationEngine:
        pool: VllmPool = request.getfixturevalue("vllm_pool")
        return pool.engine(build_model(hidden_size=HIDDEN_SIZE), max_batch=max_batch, **limits)

    makers: dict[str, MakeEngine] = {"replay": replay, "transformers": transformers, "vllm": vllm}
    return makers[request.param]


def generate(make_engine: MakeEngine, requests: Sequence[GenerationRequest], max_batch: int = 16) -> Outputs:
    return run(make_engine(requests, max_batch), requests)


_UNDISTURBED: dict[tuple[str, bool], Outputs] = {}


def undisturbed(make_engine: MakeEngine, requests: list[GenerationRequest]) -> Outputs:
    """What the engine generates of RAGGED or FILTERED in one batch; once for all tests."""
    key = make_engine.__name__, requests is FILTERED
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = generate(make_engine, requests)
    return _UNDISTURBED[key]


def test_an_engine_says_how_much_kv_it_holds(make_engine: MakeEngine) -> None:
    capacity = make_engine(RAGGED, 2).kv_capacity_tokens
    assert capacity is None or capacity >= MAX_CONTEXT


def test_a_finished_sample_frees_its_place_for_the_next_step(make_engine: MakeEngine) -> None:
    short, long, waiting = (request(0, max_new_tokens=2), request(1, max_new_tokens=9), request(2, max_new_tokens=3))
    engine = make_engine([short, long, waiting], 2)
    for one in (short, long, waiting):
        engine.submit(one)
    present = [{token.sample_id for token in engine.step()} for _ in range(4)]
    assert present == [{0, 1}, {0, 1}, {1, 2}, {1, 2}]


def test_an_id_is_refused_while_its_sample_is_present(make_engine: MakeEngine) -> None:
    one = request(4, max_new_tokens=2)
    engine = make_engine([one], 2)
    engine.submit(one)
    for _ in range(2):  # queued, then running
        with pytest.raises(ValueError, match="sample 4 is already in the engine"):
            engine.submit(one)
        with pytest.raises(ValueError, match="sample 4 is already in the engine"):
            engine.admit(Evicted(one))
        engine.step()
    run(engine)
    engine.submit(one)  # it left, so it may come again
    assert len(run(engine)[4][0]) == 2


def test_an_unknown_id_cannot_be_evicted(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 2)
    with pytest.raises(ValueError, match="sample 77 is not in the engine"):
        engine.evict(77)


def test_weights_are_refused_while_samples_are_present(
    make_engine: MakeEngine, build_model: Callable[..., PreTrainedModel]
) -> None:
    engine = make_engine([request(0)], 2)
    weights = build_model(seed=1, hidden_size=HIDDEN_SIZE).state_dict()
    engine.submit(request(0))
    for _ in range(2):  # queued, then running
        with pytest.raises(ValueError, match="cannot load weights while 1 samples"):
            engine.load_weights(weights)
        engine.step()
    run(engine)
    engine.load_weights(weights)


def test_an_engine_sleeps_when_it_is_empty_and_wakes_with_new_weights(
    make_engine: MakeEngine, build_model: Callable[..., PreTrainedModel]
) -> None:
    weights = build_model(seed=1, hidden_size=HIDDEN_SIZE).state_dict()
    engine = make_engine(RAGGED, 16)
    engine.load_weights(weights)
    expected = run(engine, RAGGED)
    engine.submit(RAGGED[0])
    with pytest.raises(ValueError, match="cannot sleep while 1 samples"):
        engine.sleep()
    run(engine)
    engine.load_weights(build_model(seed=2, hidden_size=HIDDEN_SIZE).state_dict())
    for _ in range(2):
        engine.sleep()
        with pytest.raises(ValueError, match="sample 0 was given to an engine that is asleep: load weights first"):
            engine.submit(RAGGED[0])
    engine.load_weights(weights)
    assert run(engine, RAGGED) == expected


@pytest.mark.parametrize("make_engine", ["transformers", VLLM], indirect=True)
def test_an_engine_that_sleeps_holds_no_cache(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 16)
    run(engine, RAGGED)
    assert cache_bytes(engine) > 0
    engine.sleep()
    assert cache_bytes(engine) == 0


def cache_bytes(engine: Any) -> int:
    """Memory of keys and values."""
    if isinstance(engine, TransformersEngine):
        return sum(layer.keys.untyped_storage().nbytes() for layer in engine._cache._layers)
    held: int = engine.run(_vllm_cache_bytes)
    return held


def _vllm_cache_bytes(engine: Any) -> int:
    return sum(cache.untyped_storage().nbytes() for cache in engine._core._departing.caches)


def test_a_transformers_engine_that_sleeps_holds_no_weights(build_model: Callable[..., PreTrainedModel]) -> None:
    """Ties are what they were."""
    model = build_model(tied=True)
    engine = TransformersEngine(model, max_context=MAX_CONTEXT)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = build_model(seed=1, tied=True).state_dict()
    engine.sleep()
    assert all(parameter.untyped_storage().nbytes() <= 8 for parameter in model.parameters())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    engine.load_weights({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_evicted_sample_is_gone_and_the_others_do_not_notice(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 2)
    for one in RAGGED:
        engine.submit(one)
    outputs: Outputs = {}
    collect(outputs, engine.step())
    running, queued = 1, 8
    engine.evict(running)
    assert engine.evict(queued).request == RAGGED[queued]
    run(engine, outputs=outputs)
    expected = undisturbed(make_engine, RAGGED)
    assert queued not in outputs
    assert len(outputs.pop(running)[0]) == 1
    assert_same(outputs, {sample_id: expected[sample_id] for sample_id in outputs})
    with pytest.raises(ValueError, match="sample 1 is not in the engine"):
        engine.evict(running)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("max_batch", [2, 1])
def test_neither_batch_nor_order_changes_a_token(
    make_engine: MakeEngine, max_batch: int, requests: list[GenerationRequest]
) -> None:
    assert_same(generate(make_engine, requests[::-1], max_batch), undisturbed(make_engine, requests))


def test_every_sample_gets_its_tokens_and_finishes_in_the_step_of_its_last(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 16)
    for one in RAGGED:
        engine.submit(one)
    lengths = dict.fromkeys(range(len(RAGGED)), 0)
    finished: set[int] = set()
    while tokens := engine.step():
        assert len({token.sample_id for token in tokens}) == len(tokens), "one token per sample and step"
        for token in tokens:
            assert token.sample_id not in finished
            assert math.isfinite(token.logprob)
            assert token.logprob <= 0
            lengths[token.sample_id] += 1
            assert token.finished == (lengths[token.sample_id] == RAGGED[token.sample_id].params.max_new_tokens)
            if token.finished:
                finished.add(token.sample_id)
    assert finished == set(lengths)
    assert engine.step() == []


def test_samples_may_be_submitted_at_any_step(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 16)
    outputs: Outputs = {}
    for one in RAGGED:
        engine.submit(one)
        collect(outputs, engine.step())
    assert_same(run(engine, outputs=outputs), undisturbed(make_engine, RAGGED))


def test_the_stop_token_ends_a_response_and_belongs_to_it(make_engine: MakeEngine) -> None:
    requests = [request(sample_id, max_new_tokens=60, stop=True) for sample_id in range(12)]
    outputs = generate(make_engine, requests)
    stopped = 0
    for response_ids, _ in outputs.values():
        assert STOP_TOKEN_ID not in response_ids[:-1]
        stopped += response_ids[-1] == STOP_TOKEN_ID
        assert response_ids[-1] == STOP_TOKEN_ID or len(response_ids) == 60
    assert stopped > 0, "the test needs a sample that stops"


@WITH_AND_WITHOUT
@pytest.mark.parametrize("with_kv", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_moved_sample_continues_as_if_it_had_stayed(
    make_engine: MakeEngine, with_kv: bool, num_steps: int, requests: list[GenerationRequest]
) -> None:
    """Two leave the middle of a running batch for another engine, which is running as well."""
    expected = undisturbed(make_engine, requests)
    source, target = make_engine(requests, 16), make_engine(requests, 16)
    outputs: Outputs = {}
    for one in requests[:6]:
        source.submit(one)
    for one in requests[6:]:
        target.submit(one)
    for _ in range(num_steps):
        collect(outputs, source.step())
        collect(outputs, target.step())
    moved = [sample_id for sample_id in (1, 3) if len(outputs.get(sample_id, ([],))[0]) < len(expected[sample_id][0])]
    assert moved
    for sample_id in moved:
        evicted = source.evict(sample_id, with_kv=with_kv)
        assert list(evicted.request.response_ids) == outputs.get(sample_id, ([], []))[0]
        target.admit(evicted)
    run(source, outputs=outputs)
    run(target, outputs=outputs)
    assert_same(outputs, expected)


def test_a_sample_moves_often_and_returns(make_engine: MakeEngine) -> None:
    one = request(2, max_new_tokens=40, num_prompt_tokens=50)
    engines = [make_engine([one], 16), make_engine([one], 16)]
    outputs: Outputs = {}
    evicted = Evicted(one)
    for turn in range(6):
        engine = engines[turn % 2]
        engine.admit(evicted)
        for _ in range(1 + turn):
            collect(outputs, engine.step())
        evicted = engine.evict(2, with_kv=turn % 3 == 0)
    engines[0].admit(evicted)
    assert_same(run(engines[0], outputs=outputs), generate(make_engine, [one]))


@WITH_AND_WITHOUT
def test_a_sample_resumes_from_the_tokens_already_received(
    make_engine: MakeEngine, requests: list[GenerationRequest]
) -> None:
    expected = undisturbed(make_engine, requests)
    resumed = [
        replace(one, response_ids=tuple(expected[one.sample_id][0][:3]), logprobs=tuple(expected[one.sample_id][1][:3]))
        for one in requests
    ]
    rest = generate(make_engine, resumed)
    assert_same(rest, {sample_id: (tokens[3:], logprobs[3:]) for sample_id, (tokens, logprobs) in expected.items()})


@pytest.mark.parametrize("make_engine", ["transformers", VLLM], indirect=True)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    make_engine: MakeEngine, build_model: Callable[..., PreTrainedModel]
) -> None:
    engine = make_engine([], 16)
    before = run(engine, RAGGED[:1])
    weights = build_model(seed=1, hidden_size=HIDDEN_SIZE).state_dict()
    missing = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        engine.load_weights(missing)
    with pytest.raises(ValueError, match=r"extra is not part of the model"):
        engine.load_weights({**weights, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model.norm.weight is \[3\]"):
        engine.load_weights({**weights, "model.norm.weight": torch.zeros(3)})
    assert run(engine, RAGGED[:1]) == before


def test_close_may_be_repeated(make_engine: MakeEngine) -> None:
    engine = make_engine(RAGGED, 2)
    engine.submit(RAGGED[0])
    engine.step()
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "empty prompt"),
        ({"response_ids": (1, 2), "logprobs": (-1.0,)}, "2 response tokens but 1 log-probabilities"),
        ({"response_ids": (1,) * 20, "logprobs": (-1.0,) * 20}, "already has 20 of max_new_tokens=20"),
        ({"response_ids": (STOP_TOKEN_ID,), "logprobs": (-1.0,)}, "already ended with stop token"),
    ],
)
def test_a_malformed_request_is_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(request(0, stop=True), **change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("max_new_tokens", 0),
        ("seed", 1 << 63),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", None),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
    ],
)
def test_malformed_sampling_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}: .*") as error:
        replace(request(0).params, **{field: value})
    assert "\n" not in str(error.value)

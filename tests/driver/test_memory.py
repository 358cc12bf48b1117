"""The ledger's bytes are those that tensors really take, and add up to what a run holds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from fuse.commands.known_models import config_of, spec_of
from fuse.driver.memory import (
    RESERVE_SHARE,
    Ledger,
    Phase,
    free_for_micro_batches,
    kv_cache_bytes,
    ledger,
)
from fuse.driver.memory_setup import MemorySetup, planned_models
from fuse.driver.model_size import ModelSize
from fuse.driver.size_cut import cut_by_size
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.placement import Replica, place
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.training.model_spec import ModelSpec

from ..tiny_models import ModelKind, build, classifier, language_model, spread

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of most tests: layers are measured once, and take longer than what is asked of them."""
NUM_STAGES = 2


def spec(kind: ModelKind, dtype: torch.dtype = torch.float32) -> ModelSpec:
    return ModelSpec(model_class=kind[0], config=kind[1], dtype=dtype)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    logprobs, _ = token_logprobs(hidden, head, micro_batch.targets, 1.0)
    return logprobs.mean(), {}


def batch_of(sequences: int, tokens: int = 160) -> MicroBatch:
    size = sequences * tokens
    return MicroBatch(
        input_ids=torch.arange(size).view(sequences, tokens) % 64,
        head_index=torch.arange(size),
        targets=torch.zeros(size, dtype=torch.int64),
    )


def setup_of(
    models: dict[str, ModelSpec], num_devices: int, *, placement: tuple[Replica, ...] | None = None, **options: Any
) -> MemorySetup:
    """Stages of all models that train on all devices, the critic's in the other direction."""
    autocast = options.get("autocast")
    if placement is None:
        placement = place("actor", num_devices, num_devices)
        if "critic" in models:
            placement += place("critic", num_devices, num_devices, reverse=True)
    is_fused = num_devices > 1
    given: dict[str, Any] = {
        "models": planned_models(models, autocast=autocast, gradient_checkpointing=False, split_backward=is_fused),
        "placement": placement,
        "num_devices": num_devices,
        "device_memory_bytes": 80 * 10**9,
        "accelerator": "cuda",
        "prompt_tokens": 512,
        "response_tokens": 512,
        "micro_batch_size": 1,
        "num_micro_batches": 2 * num_devices,
        "autocast": autocast,
        "generation_dtype": autocast or torch.float32,
        "engine_batch_size": 64,
        "inference_batch_size": 64,
        "inference_batch_tokens": 16384,
        "is_fused": is_fused,
    }
    return MemorySetup(**given | options)


@pytest.fixture(scope="module")
def seven_billion() -> MemorySetup:
    """Four models of Qwen2.5-7B's shape on eight devices."""
    config = config_of("qwen2.5-7b")
    scores = {"actor": False, "critic": True, "reference": False, "reward": True}
    specs = {role: spec_of(config, scores=one, dtype=torch.bfloat16) for role, one in scores.items()}
    return setup_of(specs, 8, autocast=torch.bfloat16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_stages_have_as_many_parameters_as_counted(architecture: str, tied: bool) -> None:
    kind = language_model(architecture, num_hidden_layers=3, tie_word_embeddings=tied)
    size = ModelSize.of(spec(kind))
    assert size.total == sum(parameter.numel() for parameter in build(kind).parameters())
    for num_stages in (1, 2, 3):
        stages = [TransformersStage(*kind, stage=one, num_stages=num_stages, loss=loss) for one in range(num_stages)]
        held = [sum(parameter.numel() for _, parameter in stage.named_parameters()) for stage in stages]
        assert [size.stage(one, num_stages) for one in range(num_stages)] == held


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
    ],
)
def test_known_models_have_their_published_size(name: str, parameters: int) -> None:
    assert ModelSize.of(spec_of(config_of(name), scores=False, dtype=torch.bfloat16)).total == parameters


@pytest.mark.parametrize("sequences", [2, 8])
@pytest.mark.parametrize(
    ("checkpointing", "autocast", "split"),  # any two of each
    [(False, None, False), (False, torch.bfloat16, True), (True, None, True), (True, torch.bfloat16, False)],
)
def test_activations_are_those_that_stages_hold(
    sequences: int, checkpointing: bool, autocast: torch.dtype | None, split: bool
) -> None:
    kind = language_model(**LLAMA, vocab_size=4096)
    planned = planned_models(
        {"actor": spec(kind)},
        autocast=autocast,
        gradient_checkpointing=checkpointing,
        split_backward=split,
        device="cpu",
    )["actor"].bytes
    batch = batch_of(sequences)
    for number in range(NUM_STAGES):
        stage: Any = TransformersStage(
            *kind,
            stage=number,
            num_stages=NUM_STAGES,
            loss=loss,
            autocast=autocast,
            gradient_checkpointing=checkpointing,
            split_backward=split,
        )
        spread(stage.model)
        held, deferred, peak = really_held(stage, batch, split)
        expected = planned.stage(
            Shape(*batch.input_ids.shape), 2, is_first=number == 0, is_last=number == NUM_STAGES - 1
        )
        assert expected.held == pytest.approx(held, rel=0.1)
        assert expected.deferred == pytest.approx(deferred, rel=0.1)
        assert peak <= 1.1 * (max(expected.held, expected.deferred) + expected.working)


def really_held(stage: Any, batch: MicroBatch, split: bool) -> tuple[int, int, int]:
    """From F to B or I, and from I to W; and the most at any time. Gradients of parameters are there before."""
    for _, parameter in stage.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveMemory() as live:
        stage_input = None if stage.is_first else torch.randn(stage.boundary(batch).shape).to(stage.boundary(batch))
        output = stage.forward(0, batch, stage_input)
        del stage_input
        held = live.bytes
        output_grad = None if output is None else torch.ones_like(output)
        del output
        if not split:
            stage.backward(0, output_grad)
            return held, 0, live.peak_bytes
        stage.backward_input(0, output_grad)
        del output_grad
        deferred = live.bytes
        stage.backward_weight(0)
    return held, deferred, live.peak_bytes


@pytest.mark.parametrize("decay", [None, 0.9])
def test_weights_gradients_and_moments_are_what_training_allocates(decay: float | None) -> None:
    """An average of the weights lies with the moments."""
    kind = language_model(**LLAMA, tie_word_embeddings=True)
    placement = (Replica("actor", 0, (0, 0)),)
    averaged = frozenset() if decay is None else frozenset({"actor"})
    planned = ledger(setup_of({"actor": spec(kind)}, 1, placement=placement, averaged=averaged))
    entries = {entry.what: entry.bytes[Phase.TRAINING] for entry in planned.devices[0] if entry.role == "actor"}
    stages: dict[tuple[int, int], Any] = {
        (0, number): TransformersStage(*kind, stage=number, num_stages=2, loss=loss) for number in range(2)
    }
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig(), average_decay=decay)
    parameters = [parameter for stage in stages.values() for _, parameter in stage.named_parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
    hidden = stages[0, 0].forward(0, batch_of(2), None)
    stages[0, 1].forward(0, batch_of(2), hidden)
    stages[0, 0].backward(0, stages[0, 1].backward(0, None))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert entries["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert entries["gradients"] == sum(gradient.nbytes for gradient in gradients)
    moments = [moment for _, parts in optimizer.state() for part, moment in parts.items() if part != "parameter"]
    assert entries["moments"] == sum(moment.nbytes for moment in moments)


def test_the_cache_is_what_the_engine_allocates() -> None:
    kind = language_model(**LLAMA)
    setup = setup_of({"actor": spec(kind)}, 1, prompt_tokens=16, response_tokens=84, engine_batch_size=4)
    engine = TransformersEngine(spread(build(kind)), max_batch=4, max_context=100)
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=84)
    for sample in range(4):
        engine.submit(GenerationRequest(sample_id=sample, prompt_ids=tuple(range(16)), params=params))
    while engine.step():
        pass
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in engine._cache._layers)
    assert kv_cache_bytes(setup) == pytest.approx(allocated, rel=0.1)


def test_devices_that_share_an_engine_hold_a_part_of_it() -> None:
    """Of the cache no less than one head's: here there are two."""
    kind = language_model(**LLAMA)
    setup = setup_of({"actor": spec(kind)}, 4, engine="vllm", prompt_tokens=64, response_tokens=64)

    def held(engine_devices: int, what: str, **options: Any) -> int:
        entries = ledger(replace(setup, engine_devices=engine_devices, **options)).devices[0]
        return next(one.bytes[Phase.GENERATION] for one in entries if (one.role, one.what) == ("engine", what))

    for what, at_four in (("weights", 4), ("KV cache", 2)):
        assert held(1, what) == 2 * held(2, what) == at_four * held(4, what)
    assert held(2, "KV cache", generation_cache_bytes=1 << 20) == 1 << 19


def test_replicas_share_the_moments() -> None:
    """All of what one device would have, no more than its largest tensor from even shares."""
    kind = language_model(**LLAMA)
    alone, *shared = (
        ledger(setup_of({"actor": spec(kind)}, count, placement=place("actor", count, 1))) for count in (1, 2, 4)
    )

    def moments(planned: Ledger) -> list[int]:
        return [one.bytes[Phase.TRAINING] for device in planned.devices for one in device if one.what == "moments"]

    (whole,) = moments(alone)
    largest = 8 * alone.setup.models["actor"].size.largest
    for planned, count in zip(shared, (2, 4), strict=True):
        assert sum(moments(planned)) >= whole
        assert max(moments(planned)) <= whole / count + largest
        weights = [
            one.bytes[Phase.TRAINING] for one in planned.devices[0] if (one.role, one.what) == ("actor", "weights")
        ]
        assert weights == [whole // 2]


def parts(planned: Ledger, role: str, what: str, phase: Phase = Phase.TRAINING) -> int:
    """On all devices together."""
    return sum(
        entry.bytes.get(phase, 0)
        for entries in planned.devices
        for entry in entries
        if (entry.role, entry.what) == (role, what)
    )


def test_whole_scoring_copies_everything_to_every_device(seven_billion: MemorySetup) -> None:
    planned = ledger(seven_billion)
    actor, critic = (seven_billion.models[role].size.total for role in ("actor", "critic"))
    assert parts(planned, "engine", "weights") == 8 * 2 * actor
    assert parts(planned, "reference", "scoring copy") == 8 * 2 * actor
    assert parts(planned, "reward", "scoring copy") == 8 * 2 * critic
    assert parts(planned, "critic", "scoring copy") == 8 * 4 * critic
    for role, size in (("actor", actor), ("critic", critic)):
        assert [parts(planned, role, what) for what in ("weights", "gradients", "moments")] == [
            4 * size,
            4 * size,
            8 * size,
        ]
        assert parts(planned, role, "gradients", Phase.GENERATION) == 0
    assert not planned.fits


def test_what_is_shared_in_time_is_counted_when_it_is_there(seven_billion: MemorySetup) -> None:
    """Moments are away but for training; weights of what scores by a copy, too."""
    before, after = ledger(seven_billion), ledger(replace(seven_billion, engines_sleep=True, offloads_training=True))

    def held(planned: Ledger, phase: Phase, *whats: str) -> int:
        entries = planned.devices[0]
        return sum(
            entry.bytes.get(phase, 0)
            for entry in entries
            if entry.what in whats and entry.role in ("actor", "critic", "engine")
        )

    assert held(after, Phase.GENERATION, "moments") == held(after, Phase.INFERENCE, "moments") == 0
    assert held(after, Phase.TRAINING, "moments") == held(before, Phase.TRAINING, "moments") > 0
    assert held(after, Phase.TRAINING, "KV cache") == 0 < held(before, Phase.TRAINING, "KV cache")
    assert held(after, Phase.INFERENCE, "KV cache") == held(before, Phase.INFERENCE, "KV cache")
    moved = sum(held(before, Phase.GENERATION, what) for what in ("weights", "moments"))
    assert held(after, Phase.GENERATION, "weights") < held(before, Phase.GENERATION, "weights") < moved
    assert after.host_bytes > before.host_bytes


def test_shares_and_sleeping_engines_leave_room(seven_billion: MemorySetup) -> None:
    planned = ledger(replace(seven_billion, scoring="sharded", engines_sleep=True))
    assert parts(planned, "critic", "scoring copy") == parts(planned, "critic", "scoring share") == 0
    for role in ("reference", "reward"):
        assert parts(planned, role, "scoring share") == 2 * seven_billion.models[role].size.total
    for what in ("weights", "KV cache"):
        assert parts(planned, "engine", what, Phase.GENERATION) > 0
        assert parts(planned, "engine", what) == 0
        assert parts(planned, "engine", what, Phase.INFERENCE) > 0  # samples are scored while others are generated
    assert planned.spare_bytes >= 10 * 10**9


def test_a_critic_that_one_device_trains_whole_is_scored_as_it_is() -> None:
    models = {"actor": spec(language_model(**LLAMA)), "critic": spec(classifier(**LLAMA))}
    planned = ledger(setup_of(models, 1, placement=(Replica("actor", 0, (0,)), Replica("critic", 0, (0,)))))
    assert parts(planned, "critic", "scoring copy") == 0
    assert parts(ledger(setup_of(models, 2)), "critic", "scoring copy") > 0


def test_a_fused_schedule_is_planned_within_what_is_free(seven_billion: MemorySetup) -> None:
    shared = replace(seven_billion, scoring="sharded", engines_sleep=True, offloads_training=True)
    roomy = replace(shared, device_memory_bytes=10**12)
    free = ledger(roomy)
    assert free.fused_bytes > free.serial_bytes
    between = (free.serial_bytes + free.fused_bytes) / 2 - RESERVE_SHARE * 10**12
    tight = ledger(replace(roomy, device_memory_bytes=round(between / (1 - RESERVE_SHARE))))
    assert tight.fits
    memory = tight.setup.device_memory_bytes
    without_limit = free.fused_bytes - RESERVE_SHARE * (10**12 - memory)
    assert tight.fused_bytes <= memory < without_limit


def test_what_is_free_is_not_all_for_micro_batches(seven_billion: MemorySetup) -> None:
    setup = replace(seven_billion, scoring="sharded", engines_sleep=True)
    planned = ledger(setup)
    for device, (entries, left) in enumerate(
        zip(planned.devices, free_for_micro_batches(setup, [30 * 10**9] * 8), strict=True)
    ):
        to_come = {"gradients", "working memory", "messages", "reserve"}
        expected = sum(one.bytes.get(Phase.TRAINING, 0) for one in entries if one.what in to_come)
        assert expected > 4 * 1.7e9, device
        assert left == 30 * 10**9 - expected
    # As much as is measured before an engine's cache has grown, there will not be.
    unmeasured = free_for_micro_batches(setup, [70 * 10**9, None, 0, *[10**12] * 5])
    activations = [entry for entry in planned.devices[0] if entry.what == "activations"]
    resident = planned.total(0, Phase.TRAINING) - activations[0].bytes[Phase.TRAINING]
    assert unmeasured[:3] == [80 * 10**9 - resident, None, 0]


def test_more_takes_more(seven_billion: MemorySetup) -> None:
    least = max(ledger(seven_billion).peak_bytes.values())
    for changes in (
        {"response_tokens": 2048},
        {"micro_batch_size": 4},
        {"num_micro_batches": 64, "micro_batch_size": 2},
    ):
        assert max(ledger(replace(seven_billion, **changes)).peak_bytes.values()) > least
    assert max(ledger(replace(seven_billion, scoring="sharded")).peak_bytes.values()) < least


@pytest.mark.parametrize("num_devices", [2, 3])
def test_opposite_replicas_hold_everything_that_trains_twice(num_devices: int) -> None:
    """Each rank its own stage and the one of the rank it exchanges gradients with, which share the moments of both."""
    models = {"actor": spec(language_model(**LLAMA))}
    placement = place("actor", num_devices, num_devices)
    plain = ledger(setup_of(models, num_devices, placement=placement))
    both = ledger(setup_of(models, num_devices, placement=with_opposites(placement)))
    for what in ("weights", "gradients", "moments"):
        own = [
            sum(one.bytes[Phase.TRAINING] for one in entries if (one.role, one.what) == ("actor", what))
            for entries in plain.devices
        ]
        found = [
            sum(one.bytes[Phase.TRAINING] for one in entries if (one.role, one.what) == ("actor", what))
            for entries in both.devices
        ]
        twice = [one + other for one, other in zip(own, own[::-1], strict=True)]
        if what != "moments":
            assert found == twice
            assert parts(both, "actor", what) == 2 * parts(plain, "actor", what) > 0
            continue
        for device, (num_bytes, of_both) in enumerate(zip(found, twice, strict=True)):
            if device == num_devices - 1 - device:  # alone with both copies
                assert num_bytes == of_both
            else:
                assert of_both / 2 <= num_bytes < 0.6 * of_both
    assert parts(both, "engine", "weights") == parts(plain, "engine", "weights")
    # As much is under way at once as fills the bubbles, of half as many micro-batches each.
    assert both.fused_bytes > plain.serial_bytes
    # Gradients are summed in one piece of memory.
    largest = max(entry.bytes.get(Phase.TRAINING, 0) for entry in both.devices[0] if entry.what == "gradients") // 2
    assert parts(both, "training", "working memory") >= largest


def test_cuts_by_size_leave_the_fullest_device_about_as_little_as_any() -> None:
    """All are tried. A vocabulary takes as much as some layers; one model's head is beside the other's embedding."""
    config = {**LLAMA, "num_hidden_layers": 6, "vocab_size": 4096}
    specs = {"actor": spec(language_model(**config)), "critic": spec(classifier(**config))}
    setup = setup_of(specs, 3, response_tokens=16, prompt_tokens=16)

    def peak(placement: tuple[Replica, ...]) -> int:
        return ledger(replace(setup, placement=placement), plans_fusion=False).peak_bytes[Phase.TRAINING]

    cuts = [((0, first), (first, second), (second, 6)) for first in range(1, 5) for second in range(first + 1, 6)]
    best = min(
        peak(tuple(replace(one, layer_ranges=ranges[one.model == "critic"]) for one in setup.placement))
        for ranges in itertools.product(cuts, repeat=2)
    )
    even, found = peak(setup.placement), peak(cut_by_size(setup))
    assert best <= found < even
    assert found - best < (even - best) / 4


def test_a_cut_by_size_that_changes_nothing_is_none() -> None:
    setup = setup_of({"actor": spec(language_model(**{**LLAMA, "num_hidden_layers": 2}))}, 2)
    assert cut_by_size(setup) is setup.placement


def test_ranks_that_share_stages_export_one_model_at_a_time(seven_billion: MemorySetup) -> None:
    """In the type of whoever gets it: the policy in bfloat16; to copies the critic, in float32."""
    placement = place("actor", 4, 4) + place("critic", 4, 4, reverse=True)
    exported = {
        scoring: [
            entry.bytes[Phase.GENERATION]
            for entry in ledger(
                replace(seven_billion, placement=placement, tensor_parallel_size=2, scoring=scoring), plans_fusion=False
            ).devices[0]
            if (entry.role, entry.what) == ("training", "exports")
        ]
        for scoring in ("whole", "sharded")
    }
    embedding = 152064 * 3584
    assert exported == {"whole": [4 * embedding], "sharded": [2 * embedding]}


def test_adapters_and_what_is_frozen_are_counted_as_stages_hold_them() -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    actor = spec(language_model("llama", **LLAMA, tie_word_embeddings=False), torch.bfloat16).adapted(config)
    reference = replace(actor, adapters=replace(actor.adapters, active=None), variant_of="actor")
    models = {"actor": actor, "reference": reference}
    planned = ledger(setup_of(models, NUM_STAGES, autocast=torch.bfloat16, scoring="sharded"))
    for device, entries in enumerate(planned.devices):
        bytes_ = {(entry.role, entry.what): entry.bytes.get(Phase.TRAINING, 0) for entry in entries}
        stage = TransformersStage(
            *(actor.model_class, actor.config),
            stage=device,
            num_stages=NUM_STAGES,
            loss=loss,
            **actor.stage_options(torch.bfloat16),
        )
        stage.freeze(actor.frozen)
        parameters = [one for _, one in stage.named_parameters()]
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        assert bytes_["actor", "gradients"] == 4 * trained
        assert bytes_["actor", "moments"] == 8 * trained
        assert bytes_["actor", "weights"] == pytest.approx(sum(one.nbytes for one in parameters), rel=0.02)
        assert not [what for role, what in bytes_ if role == "reference"]

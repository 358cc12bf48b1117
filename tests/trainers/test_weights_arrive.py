"""What an update trains arrives in every copy of the models: engines, scoring, checkpoint, the caller's own.

Nothing is replayed: engines sample by the weights they were given, and the trainer's first pass over their tokens, in
every update, must find the log-probabilities that they told.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from fuse import PPOTrainer
from fuse.sample import Sample, SampleState
from fuse.training import scoring as inference
from fuse.training.model_spec import ModelSpec
from fuse.training.reading import TokenSequence

from ..worker_pool import WorkerPool, _Lease
from . import tiny

ROUNDING = 1e-5
"""Of log-probabilities and values computed elsewhere; stale weights are off by 1e-2 after a step of 1e-2."""
PROBE = ((2, 5, 3), (7, 4, 9, 2))

pooled = pytest.mark.usefixtures("pooled_workers")


def models(kind: str, *, tied: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A policy and a critic of 2 layers."""
    return tiny.policy(kind, tie_word_embeddings=tied), tiny.scorer(1, kind)


class Scores(TrainerCallback):
    """After every update, what the workers' scoring copies say of a probe, and what the trained weights say.

    addresses: at which any worker listens.
    """

    def __init__(self) -> None:
        self.addresses: set[str] = set()
        self.trainer: PPOTrainer | None = None
        self.differences: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        assert trainer._fleet is not None
        samples = [Sample(index, ids[:2]) for index, ids in enumerate(PROBE)]
        for sample, ids in zip(samples, PROBE, strict=True):
            sample.response_ids[:], sample.length, sample.state = ids[2:], len(ids) - 2, SampleState.GENERATED
        trainer._fleet.infer(samples)
        trainer._fleet.fetch_weights()
        for process_id in itertools.chain(*trainer.process_ids.values()):
            sockets = psutil.Process(process_id).net_connections("inet")
            listening = {one.laddr.ip.removeprefix("::ffff:") for one in sockets if one.status == psutil.CONN_LISTEN}
            self.addresses |= listening
        sequences = [TokenSequence(ids[:2], ids[2:]) for ids in PROBE]
        values = inference.values(trainer.value_model.eval(), sequences)
        logprobs = inference.reference_logprobs(trainer.ref_model.eval(), sequences, trainer.args.sampling_temperature)
        for sample, own_values, own_logprobs in zip(samples, values, logprobs, strict=True):
            self.differences.append(float(abs(sample.values - own_values).max()))
            self.differences.append(float(abs(sample.reference_logprobs - own_logprobs).max()))


def keep_engine_weights(trainer: PPOTrainer, directory: Path) -> None:
    """Have every engine that is on one device write down what it holds after each load."""
    make_engine = trainer._settings.engine

    def make(spec: Any, weights: Any, device: str) -> Any:  # local, so that it travels to the workers by value
        import os

        engine = make_engine(spec, weights, device)
        load = engine.load_weights

        def load_and_keep(state_dict: Any) -> None:
            load(state_dict)
            if hasattr(engine, "_model"):
                held = engine._model.state_dict()
            else:
                runner = engine._core._llm.model_executor.driver_worker.worker.model_runner
                held = dict(runner.model.named_parameters())
            copies = {name: tensor.detach().float().clone() for name, tensor in held.items()}
            torch.save(copies, directory / f"{os.getpid()}.pt")

        engine.load_weights = load_and_keep
        return engine

    if trainer._settings.engine_devices == 1:
        trainer._settings = replace(trainer._settings, engine=make)


def trained(
    output_dir: Path,
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    *,
    reward: Any = tiny.count_a,
    addresses: Collection[str] = ("127.0.0.1",),
    **options: Any,
) -> PPOTrainer:
    """Three updates of one step each, so that every token was sampled by the weights that score it first."""
    output_dir.mkdir()
    scores = Scores()
    config = tiny.config(
        output_dir,
        **{"total_episodes": 24, "num_ppo_epochs": 1, "num_sample_generations": 0, "save_steps": 3, **options},
        save_strategy="steps",
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tiny.tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=reward,
        train_dataset=tiny.rows(),
        value_model=critic,
        callbacks=[scores],
    )
    scores.trainer = trainer
    keep_engine_weights(trainer, output_dir)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer.train()

    log = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert [row["val/sampler_logprob_diff"] < ROUNDING for row in log] == [True] * 3
    assert all(row["val/sampler_logprob_diff_max"] < 10 * ROUNDING for row in log)
    assert all(row["policy/approxkl_avg"] < 1e-8 for row in log)
    assert max(scores.differences) < 10 * ROUNDING
    assert scores.addresses == {*addresses}, "the network could reach a worker"
    after = policy.state_dict()
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3, "training moved nothing"
    saved = AutoModelForCausalLM.from_pretrained(output_dir / "checkpoint-3")
    assert tiny.difference(saved, policy) == 0.0
    return trainer


def check_engines(output_dir: Path, policy: PreTrainedModel, num_devices: int) -> None:
    """What the engines of the last update hold is what was trained, to the bit."""
    files = list(output_dir.glob("*.pt"))
    assert len(files) == num_devices
    expected: dict[str, Tensor] = {name: tensor.float() for name, tensor in policy.state_dict().items()}
    for file in files:
        held = {name: tensor for name, tensor in torch.load(file).items() if tensor.numel()}
        assert any("embed" in name for name in held)  # vLLM packs others, and keeps no plain copy of them
        for name, tensor in held.items():
            parts = [expected[part] for part in _parts(name) if part in expected]
            assert parts, f"{name} is no weight of the policy"
            assert torch.equal(tensor[: sum(map(len, parts))], torch.cat(parts)), name


def _parts(name: str) -> list[str]:
    """The Hugging Face weights that vLLM's are made of; of transformers' each is its own."""
    for fused, parts in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.items():
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


@pooled
@pytest.mark.parametrize(
    ("kind", "tied", "num_devices"),
    [
        ("llama", True, 1),
        ("llama", False, 2),
        ("qwen2", True, 2),
        ("gpt_neox", False, 1),
    ],
)
def test_every_copy_has_what_an_update_trained(
    tmp_path: Path,
    kind: str,
    tied: bool,
    num_devices: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run is of devices that seem to be on two hosts: weights go from one to the other by broadcast."""
    policy, critic = models(kind, tied=tied)
    addresses, by = ["127.0.0.1"], " by shared memory, 128 MiB or one tensor at a time"
    if kind == "qwen2":
        addresses, by = ["127.0.0.1", "127.0.0.2"], "to devices 1 by shared memory and to devices 0 by gloo broadcast"
        monkeypatch.setattr(_Lease, "host", lambda _, device: addresses[device])
    with caplog.at_level(logging.INFO, logger="fuse"):
        trained(tmp_path / "run", policy, critic, num_devices=num_devices, addresses=addresses)
    assert by in caplog.text
    check_engines(tmp_path / "run", policy, num_devices)
    assert (policy.get_output_embeddings().weight is policy.get_input_embeddings().weight) == tied


@pooled
def test_a_tied_model_trains_on_megatron_stages(tmp_path: Path) -> None:
    policy, critic = tiny.policy(tie_word_embeddings=True, num_key_value_heads=2), tiny.scorer(1, num_key_value_heads=2)
    trained(tmp_path / "run", policy, critic, num_devices=2, train_backend="megatron")
    check_engines(tmp_path / "run", policy, 2)


@pooled
def test_a_tied_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, critic = models("llama", tied=True)
    trained(tmp_path / "whole", whole, critic, num_devices=2, save_steps=1)
    check_engines(tmp_path / "whole", whole, 2)
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    resumed = tiny.trainer(
        tmp_path / "whole",
        models={"tie_word_embeddings": True},
        num_devices=1,
        total_episodes=24,
        num_ppo_epochs=1,
        num_sample_generations=0,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    log = resumed.state.log_history
    assert all(row["val/sampler_logprob_diff"] < ROUNDING for row in log if "val/sampler_logprob_diff" in row)
    assert tiny.difference(resumed.policy_model, whole) < tiny.ROUNDING


@pooled
@pytest.mark.slow
@pytest.mark.vllm_workers
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_run_with_vllm_is_the_run_with_transformers(tmp_path: Path, worker_pool: WorkerPool) -> None:
    """With either engine, every copy has what was trained; and responses, scores and weights are the same.

    Also with one engine on both devices.
    """

    def train(engine: str, **options: Any) -> tuple[PPOTrainer, list[str]]:
        responses: list[str] = []

        def reward(prompts: list[str], completions: list[str], target: list[int]) -> list[float]:
            responses.extend(completions)
            return tiny.count_a(prompts, completions, target)

        policy = tiny.policy(tie_word_embeddings=True, head_dim=32)
        output_dir = tmp_path / f"{engine}-{len(options)}"
        trainer = trained(
            output_dir,
            policy,
            tiny.scorer(1, head_dim=32),
            reward=reward,
            num_devices=2,
            engine=engine,
            **options,
        )
        if trainer._settings.engine_devices == 1:
            check_engines(output_dir, policy, 2)
        return trainer, sorted(responses)

    expected, expected_responses = train("transformers")
    try:
        runs = [
            train("vllm", generation_cache_bytes=1 << 22, **options)
            for options in ({}, {"generation_tensor_parallel_size": 2})
        ]
    finally:
        worker_pool.end("generation worker")  # vLLM takes its process over
    for trainer, responses in runs:
        assert responses == expected_responses
        assert tiny.difference(trainer.policy_model, expected.policy_model) < tiny.ROUNDING
        kl, expected_kl = ([row["objective/kl"] for row in one.state.log_history] for one in (trainer, expected))
        assert kl == pytest.approx(expected_kl, abs=1e-4)


def test_what_copies_could_not_share_is_refused() -> None:
    policy = tiny.policy()
    policy.model.layers[1].mlp.up_proj.weight = policy.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"shares one tensor between model\.layers\.0\.mlp\.up_proj\.weight and"):
        ModelSpec.of(policy)


def test_a_copy_is_tied_as_the_original_is_whatever_its_configuration_says() -> None:
    for tied in (True, False):
        policy = tiny.policy(tie_word_embeddings=True)
        if not tied:
            policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach() + 1)
        built: Any = ModelSpec.of(policy).build(torch.device("cpu"))
        assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied


def test_rotary_frequencies_of_a_rounded_copy_are_not_rounded() -> None:
    policy = tiny.policy()
    built: Any = ModelSpec.of(policy).build(torch.device("cpu"), torch.bfloat16)
    assert built.dtype == torch.bfloat16
    assert torch.equal(built.model.rotary_emb.inv_freq, policy.model.rotary_emb.inv_freq)

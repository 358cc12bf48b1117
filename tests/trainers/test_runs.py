"""Whole runs: what a user of the trainer sees, on one device and on two."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse import PPOTrainer
from fuse.interstage.recorded import recorded_rollout
from fuse.metric_table import entry_of, is_timed
from fuse.update_log import NAME, read
from fuse.workers.errors import WorkerError

from ..worker_pool import WorkerPool
from . import tiny

pytestmark = pytest.mark.usefixtures("pooled_workers")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, worker_pool: WorkerPool) -> PPOTrainer:
    """A run on one device."""
    with worker_pool.in_use():
        return tiny.train(tmp_path_factory.mktemp("plain"))


LOOKED_AT_FIRST = {
    *("completions/mean_length", "completions/max_length", "completions/clipped_ratio"),
    *("tokens_per_s/generation", "tokens_per_s/training", "tokens_per_s/total"),
    *("grad_norm/actor", "grad_norm/critic", "critic/explained_variance"),
    *("objective/scores", "objective/scores_std", "val/sampler_logprob_diff"),
    *(f"objective/kl_quartile_{quarter}" for quarter in range(1, 5)),
    *("idle_cause/weights", "memory/device0", "migration/samples"),
}


def test_a_run_on_two_devices_is_the_run_on_one(tmp_path: Path, plain: PPOTrainer) -> None:
    two = tiny.train(tmp_path / "two", num_devices=2, report_to="tensorboard", save_strategy="steps", save_steps=1)

    for row_one, row_two in zip(plain.state.log_history, two.state.log_history, strict=True):
        assert row_one.keys() >= LOOKED_AT_FIRST
        assert not [name for name in row_two if not entry_of(name)]
        causes = sum(value for name, value in row_two.items() if name.startswith("idle_cause/"))
        assert causes == pytest.approx((row_two["idle/device0"] + row_two["idle/device1"]) / 2)
        for name, value in row_one.items():
            assert entry_of(name), f"docs/metrics.md has no {name}"
            if not is_timed(name):
                assert row_two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert tiny.difference(plain.policy_model, two.policy_model) < tiny.ROUNDING
    assert tiny.difference(plain.value_model, two.value_model) < tiny.ROUNDING
    assert tiny.difference(plain.policy_model, plain.ref_model) > 1e-3, "training moved nothing"

    _check_trace(tmp_path / "two" / "traces" / "iteration-00002.json")
    _check_tensorboard(tmp_path / "two", two.state.log_history[-1]["objective/scores"])
    saved = tmp_path / "two" / "checkpoint-2"
    assert tiny.difference(AutoModelForCausalLM.from_pretrained(saved), two.policy_model) == 0.0
    assert AutoTokenizer.from_pretrained(saved).pad_token == "<pad>"
    assert not list(saved.rglob("*.bin")), "only safetensors and JSON"


def test_replicas_and_bfloat16(tmp_path: Path, plain: PPOTrainer) -> None:
    replicated = tiny.train(tmp_path / "replicated", num_devices=2, actor_stages=1, critic_stages=2)
    assert tiny.difference(plain.policy_model, replicated.policy_model) < tiny.ROUNDING
    assert tiny.difference(plain.value_model, replicated.value_model) < tiny.ROUNDING

    rounded = tiny.train(tmp_path / "rounded", num_devices=1, bf16=True, gradient_checkpointing=True)
    assert rounded.policy_model.dtype == torch.float32, "the weights stay in fp32"
    first, first_rounded = plain.state.log_history[0], rounded.state.log_history[0]
    assert first["loss/value_avg"] != first_rounded["loss/value_avg"], "nothing was computed in bfloat16"
    assert first["objective/entropy"] == pytest.approx(first_rounded["objective/entropy"], rel=0.1)


def test_padding_of_the_vocabulary_is_neither_drawn_nor_scored_but_in_trls_layout(tmp_path: Path) -> None:
    drawn = {}
    for quirks in (False, True):
        options: dict[str, Any] = {"num_ppo_epochs": 1, "stop_token": None, "temperature": 3.0, "trl_quirks": quirks}
        made = tiny.trainer(tmp_path / str(quirks), models={"vocab_size": 40}, **options)
        made.reward_model = lambda prompts, responses, target: [0.0] * len(prompts)
        with made.updates() as updates:
            drawn[quirks] = {token for one in updates for sample in one.samples for token in sample.response_ids}
        assert all(row["val/sampler_logprob_diff"] < 1e-5 for row in made.state.log_history)
    assert max(drawn[False]) < len(tiny.VOCABULARY) < max(drawn[True])


def test_frozen_parameters_stay_to_the_bit_on_one_device_and_on_two(tmp_path: Path) -> None:
    runs = []
    for num_devices in (1, 2):
        made = tiny.trainer(tmp_path / str(num_devices), num_devices=num_devices, save_strategy="steps", save_steps=1)
        for name, parameter in [*made.policy_model.named_parameters(), *made.value_model.named_parameters()]:
            parameter.requires_grad_("layers.0." not in name and "embed_tokens" not in name)
        initial = copy.deepcopy(made.model)
        made.train()
        runs.append(made)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(num_devices) / "checkpoint-2")
        for start, model in ((initial.policy, saved), (initial.value_model, made.value_model)):
            after = model.state_dict()
            moved = {key: float((one - after[key]).abs().max()) for key, one in start.state_dict().items()}
            frozen = {key for key in moved if "layers.0." in key or "embed_tokens" in key}
            assert {key for key, distance in moved.items() if distance == 0.0} == frozen
        resumed = tiny.trainer(tmp_path / str(num_devices), total_episodes=24, num_devices=num_devices)
        with pytest.raises(WorkerError, match=r"parameter\.model\.embed_tokens.weight is missing"):
            resumed.train(resume_from_checkpoint=True)
    assert tiny.difference(runs[0].policy_model, runs[1].policy_model) < tiny.ROUNDING
    assert tiny.difference(runs[0].value_model, runs[1].value_model) < tiny.ROUNDING


def test_a_model_in_bfloat16_trains_in_float32_and_is_saved_as_it_was(tmp_path: Path) -> None:
    rounded, plain = tiny.trainer(tmp_path / "rounded"), tiny.trainer(tmp_path / "plain")
    for model in (rounded.policy_model, rounded.ref_model, rounded.value_model):
        model.bfloat16()
    for name in ("policy_model", "ref_model", "value_model"):
        getattr(plain, name).load_state_dict(getattr(rounded, name).state_dict())
    for made in (rounded, plain):
        made.train()
        made.save_model()
    assert rounded.state.log_history[-1]["loss/policy_avg"] == pytest.approx(
        plain.state.log_history[-1]["loss/policy_avg"], rel=1e-5
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto")
    assert saved.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").bfloat16()
    assert tiny.difference(saved, expected) <= 2**-8  # where rounding falls to the other side


def test_training_again_goes_on_from_the_weights_with_a_new_schedule(tmp_path: Path) -> None:
    made = tiny.train(tmp_path)
    rates, weights = [row["lr"] for row in made.state.log_history], copy.deepcopy(made.policy_model)
    made.train()
    assert [row["lr"] for row in made.state.log_history] == rates
    assert rates[0] == made.args.learning_rate
    assert tiny.difference(made.policy_model, weights) > 1e-3


def test_training_fused_changes_nothing_but_rounding(tmp_path: Path) -> None:
    # Inference adds up in the order of its batches, and with inter-stage fusion these depend on time: off here.
    options: dict[str, Any] = {
        "num_devices": 2,
        "actor_stages": 4,
        "models": {"num_hidden_layers": 4},
        "inter_stage_fusion": False,
        "num_micro_batches": 1,  # those drawn; else both choose by times
    }
    fused = tiny.train(tmp_path / "fused", **options)
    serial = tiny.train(tmp_path / "serial", intra_stage_fusion=False, balance_stages=False, **options)
    assert tiny.difference(fused.policy_model, serial.policy_model) < 1e-6
    assert tiny.difference(fused.value_model, serial.value_model) < 1e-6

    planned, unplanned = fused.state.log_history[-1], serial.state.log_history[-1]
    assert all(0 <= planned[f"bubble/{name}"] < 1 for name in ("planned", "executed", "serial"))
    assert not [name for name in unplanned if name.startswith("bubble/")]
    assert (tmp_path / "fused" / "plan" / "profile.json").exists()
    trace = json.loads((tmp_path / "fused" / "traces" / "iteration-00002.json").read_text())
    operations = [event for event in trace["traceEvents"] if event.get("cat") == "train"]
    assert {"F actor.3.0", "F critic.1.0"} <= {event["name"] for event in operations}
    assert all(event["args"]["planned_start_s"] < event["args"]["planned_end_s"] for event in operations)


def test_scoring_while_others_are_generated_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "response_length": 24}
    stage_by_stage = tiny.train(tmp_path / "off", inter_stage_fusion=False, **options)
    for policy in ("adaptive", "threshold", "none"):
        fused = tiny.train(tmp_path / policy, migration_policy=policy, **options)
        for off, on in zip(stage_by_stage.state.log_history, fused.state.log_history, strict=True):
            for name in ("objective/kl", "objective/scores", "val/num_eos_tokens"):
                assert on[name] == pytest.approx(off[name], rel=1e-4, abs=1e-5), (policy, name)
        assert "time/rollout" in fused.state.log_history[0]
        assert "time/generation" in stage_by_stage.state.log_history[0]
        assert tiny.difference(fused.policy_model, stage_by_stage.policy_model) < tiny.ROUNDING
        assert tiny.difference(fused.value_model, stage_by_stage.value_model) < tiny.ROUNDING


def test_rewards_may_be_async_and_come_from_several_threads(tmp_path: Path, plain: PPOTrainer) -> None:
    threads: set[int] = set()

    async def slow_count(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        threads.add(threading.get_ident())
        await asyncio.sleep(0.01)
        return tiny.count_a(prompts, responses, target)

    awaited = tiny.train(tmp_path / "awaited", reward=slow_count)
    assert threading.get_ident() not in threads
    assert tiny.difference(plain.policy_model, awaited.policy_model) < 1e-6


def test_rewards_that_fail_are_scored_and_counted_where_asked_for(tmp_path: Path) -> None:
    def picky(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        if any(number % 4 == 0 for number in target):
            raise KeyError("no answer")
        return [float(threading.current_thread() is threading.main_thread()) for _ in responses]

    options: dict[str, Any] = {"reward_workers": "process", "reward_error_score": -3.0, "num_sample_generations": 0}
    for fused in (True, False):
        trained = tiny.train(tmp_path, reward=picky, inter_stage_fusion=fused, **options)
        errors = [row["rewards/errors"] for row in trained.state.log_history]
        assert sum(errors) == 4, "of 16 targets"
        for row, count in zip(trained.state.log_history, errors, strict=True):
            assert row["objective/scores"] == pytest.approx((8 - count - 3 * count) / 8)


def test_a_run_on_megatron_stages_goes_on_with_others(tmp_path: Path) -> None:
    models = {"num_key_value_heads": 2}
    options: dict[str, Any] = {"train_backend": "megatron", "tensor_parallel_size": 2}
    shared = tiny.train(tmp_path, models=models, num_devices=2, save_strategy="steps", save_steps=1, **options)
    resumed = tiny.trainer(tmp_path, models=models, num_devices=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert tiny.difference(resumed.policy_model, shared.policy_model) < 3e-5
    assert tiny.difference(resumed.value_model, shared.value_model) < 3e-5


def _check_trace(path: Path) -> None:
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"].get("name") for event in events if event["ph"] == "M"}
    assert {"device0", "device1", "generation", "model", "driver", "phases", "rewards", "sample lane 0"} <= names
    operations = {event["name"] for event in events if event["ph"] == "X"}
    assert {"decode", "reference", "critic", "F actor.0.0", "F critic.1.3", "step actor", "load weights"} <= operations
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")
    stays, scored, rewarded = (
        [event["args"] for event in events if event.get("cat") == category and event["ph"] == "X"]
        for category in ("sample", "infer", "reward")
    )
    second = set(range(8, 16))
    assert {one["sample"] for one in stays if one["finished"]} == second
    assert {sample for one in scored for sample in one["sample_ids"]} == second
    assert {sample for one in rewarded for sample in one["sample_ids"]} == second
    assert {event["id"] for event in events if event["ph"] == "s"} == {
        event["id"] for event in events if event["ph"] == "f"
    }
    phases = {event["name"] for event in events if event.get("cat") == "phase"}
    assert {"rollout", "reward", "training", "weights"} <= phases
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"live samples", "KV tokens", "bytes of model"}
    recorded = recorded_rollout(json.loads(path.read_text()))
    assert recorded is not None
    assert recorded.tokens.keys() == second
    assert recorded.policy == "adaptive"
    first, last = read(path.parents[1] / NAME)
    assert (first.update, last.update, last.metrics["episode"]) == (1, 2, 16)
    assert {device: len(cells) for device, cells in last.strips.items()} == {"device0": 64, "device1": 64}


def _check_tensorboard(output_dir: Path, last_score: float) -> None:
    (file,) = output_dir.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file.parent))
    accumulator.Reload()
    assert accumulator.Scalars("train/objective/scores")[-1].value == pytest.approx(last_score)


def test_unusable_rewards_end_the_run_with_one_clear_line(tmp_path: Path) -> None:
    def nan_for_last(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [0.0] * (len(responses) - 1) + [math.nan]

    trainer = tiny.trainer(tmp_path, reward=nan_for_last)
    with pytest.raises(ValueError, match=r"reward function nan_for_last returned nan for response \d+ .*finite"):
        trainer.train()


def test_completions_are_shown_with_their_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny.trainer(tmp_path, reward=tiny.scorer(5), num_sample_generations=1, per_device_eval_batch_size=2)
    trainer.eval_dataset = tiny.rows(4)
    trainer.train()
    printed = capsys.readouterr().out
    assert "model response" in printed
    assert "score" in printed

"""Whole runs: what a user of the trainer sees, on one device and on two."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fuse import PPOTrainer
from fuse.workers.errors import WorkerError

from . import tiny

pytestmark = pytest.mark.usefixtures("cluster")

ROUNDING = 1e-4
"""Of weights after steps of 1e-2, where micro-batches of inference differ: another token makes a hundred times more."""


def _train(output_dir: Path, **options: Any) -> PPOTrainer:
    trainer = tiny.trainer(output_dir, **options)
    trainer.train()
    return trainer


def _difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def test_a_run_on_two_devices_is_the_run_on_one(tmp_path: Path) -> None:
    one = _train(tmp_path / "one", num_devices=1)
    two = _train(tmp_path / "two", num_devices=2, report_to="tensorboard", save_strategy="steps", save_steps=1)

    timed = ("time/", "idle/", "eps")
    for row_one, row_two in zip(one.state.log_history, two.state.log_history, strict=True):
        for name, value in row_one.items():
            if not name.startswith(timed):
                assert row_two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert _difference(one.policy_model, two.policy_model) < ROUNDING
    assert _difference(one.value_model, two.value_model) < ROUNDING
    assert _difference(one.policy_model, one.ref_model) > 1e-3, "training moved nothing"

    _check_trace(tmp_path / "two" / "traces" / "iteration-00002.json")
    _check_tensorboard(tmp_path / "two", two.state.log_history[-1]["objective/scores"])
    saved = tmp_path / "two" / "checkpoint-2"
    assert _difference(AutoModelForCausalLM.from_pretrained(saved), two.policy_model) == 0.0
    assert AutoTokenizer.from_pretrained(saved).pad_token == "<pad>"
    assert not list(saved.rglob("*.bin")), "only safetensors and JSON"


def test_replicas_and_bfloat16(tmp_path: Path) -> None:
    one = _train(tmp_path / "one", num_devices=1)
    replicated = _train(tmp_path / "replicated", num_devices=2, actor_stages=1, critic_stages=2)
    assert _difference(one.policy_model, replicated.policy_model) < ROUNDING
    assert _difference(one.value_model, replicated.value_model) < ROUNDING

    rounded = _train(tmp_path / "rounded", num_devices=1, bf16=True, gradient_checkpointing=True)
    assert rounded.policy_model.dtype == torch.float32, "the weights stay in fp32"
    first, first_rounded = one.state.log_history[0], rounded.state.log_history[0]
    assert first["loss/value_avg"] != first_rounded["loss/value_avg"], "nothing was computed in bfloat16"
    assert first["objective/entropy"] == pytest.approx(first_rounded["objective/entropy"], rel=0.1)


def test_training_fused_changes_no_bit(tmp_path: Path) -> None:
    # Inference adds up in the order of its batches, and with inter-stage fusion these depend on time: off here.
    options: dict[str, Any] = {
        "num_devices": 2,
        "actor_stages": 4,
        "models": {"num_hidden_layers": 4},
        "inter_stage_fusion": False,
    }
    fused = _train(tmp_path / "fused", **options)
    serial = _train(tmp_path / "serial", intra_stage_fusion=False, balance_stages=False, **options)
    assert _difference(fused.policy_model, serial.policy_model) == 0.0
    assert _difference(fused.value_model, serial.value_model) == 0.0

    planned, unplanned = fused.state.log_history[-1], serial.state.log_history[-1]
    assert planned["bubble/planned"] < planned["bubble/serial"]
    assert 0 <= planned["bubble/executed"] < 1
    assert not [name for name in unplanned if name.startswith("bubble/")]
    assert (tmp_path / "fused" / "plan" / "profile.json").exists()
    trace = json.loads((tmp_path / "fused" / "traces" / "iteration-00002.json").read_text())
    operations = [event for event in trace["traceEvents"] if event.get("cat") == "train"]
    assert {"F actor.3.0", "F critic.1.0"} <= {event["name"] for event in operations}
    assert all(event["args"]["planned_start_s"] < event["args"]["planned_end_s"] for event in operations)


def test_scoring_while_others_are_generated_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "response_length": 24}
    stage_by_stage = _train(tmp_path / "off", inter_stage_fusion=False, **options)
    for policy in ("adaptive", "threshold", "none"):
        fused = _train(tmp_path / policy, migration_policy=policy, **options)
        for off, on in zip(stage_by_stage.state.log_history, fused.state.log_history, strict=True):
            for name in ("objective/kl", "objective/scores", "val/num_eos_tokens"):
                assert on[name] == pytest.approx(off[name], rel=1e-4, abs=1e-6), (policy, name)
        assert "time/rollout" in fused.state.log_history[0]
        assert "time/generation" in stage_by_stage.state.log_history[0]
        assert _difference(fused.policy_model, stage_by_stage.policy_model) < ROUNDING
        assert _difference(fused.value_model, stage_by_stage.value_model) < ROUNDING


def test_an_engine_killed_while_it_generates_costs_no_sample(tmp_path: Path) -> None:
    killed: list[int] = []
    killing = threading.Lock()  # rewards are called from several threads

    def kill_an_engine(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        with killing:
            if not killed:  # called as soon as the first samples are finished
                engines = [
                    process
                    for process in psutil.Process().children(recursive=True)
                    if process.name().startswith("ray::_ConcurrentProcess")
                ]
                killed.append(engines[0].pid)
                engines[0].kill()
        return tiny.count_a(prompts, responses, target)

    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "response_length": 48}
    undisturbed = _train(tmp_path / "undisturbed", **options)
    disturbed = _train(tmp_path / "disturbed", reward=kill_an_engine, **options)
    assert len(killed) == 1
    assert _difference(disturbed.policy_model, undisturbed.policy_model) < ROUNDING
    assert _difference(disturbed.value_model, undisturbed.value_model) < ROUNDING


def test_rewards_may_be_async_and_come_from_several_threads(tmp_path: Path) -> None:
    plain = _train(tmp_path / "plain")
    threads: set[int] = set()

    async def slow_count(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        threads.add(threading.get_ident())
        await asyncio.sleep(0.01)
        return tiny.count_a(prompts, responses, target)

    awaited = _train(tmp_path / "awaited", reward=slow_count)
    assert threading.get_ident() not in threads
    assert _difference(plain.policy_model, awaited.policy_model) < 1e-6


def test_a_run_on_megatron_stages_goes_on_with_others(tmp_path: Path) -> None:
    models = {"num_key_value_heads": 2}
    options: dict[str, Any] = {"train_backend": "megatron", "tensor_parallel_size": 2}
    shared = _train(tmp_path, models=models, num_devices=2, save_strategy="steps", save_steps=1, **options)
    resumed = tiny.trainer(tmp_path, models=models, num_devices=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert _difference(resumed.policy_model, shared.policy_model) < 3e-5
    assert _difference(resumed.value_model, shared.value_model) < 3e-5


def _check_trace(path: Path) -> None:
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"device0", "device1", "generation", "model"} <= names
    operations = {event["name"] for event in events if event["ph"] == "X"}
    assert {"decode", "reference", "critic", "F actor.0.0", "F critic.1.3", "step actor", "load weights"} <= operations
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


def _check_tensorboard(output_dir: Path, last_score: float) -> None:
    (file,) = output_dir.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file.parent))
    accumulator.Reload()
    assert accumulator.Scalars("train/objective/scores")[-1].value == pytest.approx(last_score)


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", total_episodes=32, num_sample_generations=0)

    output_dir = tmp_path / "killed"
    command = [sys.executable, tiny.__file__, str(output_dir), "--devices", "2"]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (output_dir / "checkpoint-2").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, orphans = psutil.wait_procs(children, timeout=60)  # Ray's agents look for their parent every few seconds
    assert not orphans

    resumed = tiny.trainer(output_dir, total_episodes=32, num_sample_generations=0)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.state.log_history) == 4
    assert _difference(whole.policy_model, resumed.policy_model) < ROUNDING  # two devices, then one
    assert _difference(whole.value_model, resumed.value_model) < ROUNDING
    assert not [path.name for path in output_dir.iterdir() if path.name.startswith(".")]


class _KillAWorker(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.name().startswith("ray::_Process")
            ]
            workers[0].kill()


def test_a_dead_worker_ends_the_run_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, num_devices=2, save_strategy="steps", save_steps=1, callbacks=[_KillAWorker()], report_to="none"
    )
    with pytest.raises(WorkerError, match=r"model worker on device \d failed: its process died"):
        trainer.train()
    checkpoints = [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name]
    assert checkpoints in ([], ["checkpoint-1"])


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

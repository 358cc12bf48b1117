"""Whole runs: what a user of the trainer sees, on one device and on two."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
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
    assert _difference(one.policy_model, two.policy_model) < 1e-5
    assert _difference(one.value_model, two.value_model) < 1e-5
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
    assert _difference(one.policy_model, replicated.policy_model) < 1e-5
    assert _difference(one.value_model, replicated.value_model) < 1e-5

    rounded = _train(tmp_path / "rounded", num_devices=1, bf16=True, gradient_checkpointing=True)
    assert rounded.policy_model.dtype == torch.float32, "the weights stay in fp32"
    first, first_rounded = one.state.log_history[0], rounded.state.log_history[0]
    assert first["loss/value_avg"] != first_rounded["loss/value_avg"], "nothing was computed in bfloat16"
    assert first["objective/entropy"] == pytest.approx(first_rounded["objective/entropy"], rel=0.1)


def _check_trace(path: Path) -> None:
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"device0", "device1", "generation", "model"} <= names
    operations = {event["name"] for event in events if event["ph"] == "X"}
    assert {"decode", "reference", "critic", "F actor.0.0", "B critic.1.3", "step actor", "load weights"} <= operations
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
    assert _difference(whole.policy_model, resumed.policy_model) < 1e-5  # two devices, then one
    assert _difference(whole.value_model, resumed.value_model) < 1e-5
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
    def nan_for_one(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [0.0, math.nan] + [0.0] * (len(responses) - 2)

    trainer = tiny.trainer(tmp_path, reward=nan_for_one)
    with pytest.raises(ValueError, match=r"reward function nan_for_one returned nan for response 1 .*finite"):
        trainer.train()


def test_completions_are_shown_with_their_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny.trainer(tmp_path, reward=tiny.scorer(5), num_sample_generations=1, per_device_eval_batch_size=2)
    trainer.eval_dataset = tiny.rows(4)
    trainer.train()
    printed = capsys.readouterr().out
    assert "model response" in printed
    assert "score" in printed

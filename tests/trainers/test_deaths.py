"""Runs of which processes die: an engine, a model worker, the driver."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback

from fuse.workers.errors import WorkerError

from ..worker_pool import WorkerPool
from . import tiny

pytestmark = pytest.mark.usefixtures("cluster")


def test_an_engine_killed_while_it_generates_costs_no_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, worker_pool: WorkerPool
) -> None:
    """Killed when the first sample is finished; all others last for a second and more."""
    options: dict[str, Any] = {
        "models": {"vocab_size": 512, "max_position_embeddings": 1024},
        "num_devices": 2,
        "response_length": 600,
        "num_sample_generations": 0,
    }
    with worker_pool.in_use():
        undisturbed = tiny.train(tmp_path / "undisturbed", **options)
    engines: list[int] = []

    def kill_an_engine(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        while engines:
            os.kill(engines.pop(), signal.SIGKILL)
        return tiny.count_a(prompts, responses, target)

    disturbed = tiny.trainer(tmp_path / "disturbed", reward=kill_an_engine, **options)

    class ChooseAnEngine(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert disturbed._fleet is not None
            engines.append(disturbed._fleet._generation_workers[1].worker.process_id)

    disturbed.add_callback(ChooseAnEngine())
    with caplog.at_level(logging.WARNING):
        disturbed.train()
    assert "generation worker on device 1 failed: its process died" in caplog.text
    assert "its samples go on elsewhere" in caplog.text
    assert tiny.difference(disturbed.policy_model, undisturbed.policy_model) < tiny.ROUNDING
    assert tiny.difference(disturbed.value_model, undisturbed.value_model) < tiny.ROUNDING


@pytest.mark.parametrize("followed_by", ["_prepare", "generate_completions"])
def test_an_engine_that_dies_between_rollouts_is_replaced(
    tmp_path: Path,
    followed_by: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    worker_pool: WorkerPool,
) -> None:
    """Training follows, and then new weights; or another rollout, by the weights that the engine had."""
    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "num_sample_generations": 1}
    with worker_pool.in_use():
        undisturbed = tiny.train(tmp_path / "undisturbed", **options)
    disturbed = tiny.trainer(tmp_path / "disturbed", per_device_eval_batch_size=2, **options)
    disturbed.eval_dataset = tiny.rows(4)
    method = getattr(disturbed, followed_by)

    def kill_an_engine_first(*arguments: Any, **keywords: Any) -> Any:
        if disturbed.state.global_step == 1:
            assert disturbed._fleet is not None
            os.kill(disturbed._fleet._generation_workers[1].worker.process_id, signal.SIGKILL)
        return method(*arguments, **keywords)

    monkeypatch.setattr(disturbed, followed_by, kill_an_engine_first)
    with caplog.at_level(logging.WARNING):
        disturbed.train()
    assert "generation worker on device 1 failed: its process died" in caplog.text
    assert tiny.difference(disturbed.policy_model, undisturbed.policy_model) < tiny.ROUNDING
    assert tiny.difference(disturbed.value_model, undisturbed.value_model) < tiny.ROUNDING


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path, worker_pool: WorkerPool) -> None:
    with worker_pool.in_use():
        whole = tiny.train(tmp_path / "whole", total_episodes=32, num_sample_generations=0)

    output_dir = tmp_path / "killed"
    command = [sys.executable, tiny.__file__, str(output_dir), "--devices", "2"]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not (output_dir / "checkpoint-2").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, orphans = psutil.wait_procs(children, timeout=60)  # Ray's agents look for their parent every few seconds
    # Those that lost their parent wait for init to take note of their end.
    assert not [process for process in orphans if process.status() != psutil.STATUS_ZOMBIE]

    resumed = tiny.trainer(output_dir, total_episodes=32, num_sample_generations=0)
    with worker_pool.in_use():
        resumed.train(resume_from_checkpoint=True)
    assert len(resumed.state.log_history) == 4
    assert tiny.difference(whole.policy_model, resumed.policy_model) < tiny.ROUNDING  # two devices, then one
    assert tiny.difference(whole.value_model, resumed.value_model) < tiny.ROUNDING
    assert not [path.name for path in output_dir.iterdir() if path.name.startswith(".")]


def test_a_dead_worker_ends_the_run_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, num_devices=2, save_strategy="steps", save_steps=1)

    class KillAWorker(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer._fleet is not None
            os.kill(trainer._fleet._model_workers[0].worker.process_id, signal.SIGKILL)

    trainer.add_callback(KillAWorker())
    with pytest.raises(WorkerError, match=r"model worker on device \d failed: its process died"):
        trainer.train()
    checkpoints = [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name]
    assert checkpoints in ([], ["checkpoint-1"])

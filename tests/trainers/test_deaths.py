"""Runs of which processes die: an engine, a model worker, the driver."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback

from fuse import PPOTrainer
from fuse.driver import weight_streams
from fuse.driver.fleet import Fleet
from fuse.workers import generation_handle
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weight_taker import WeightTakerHandle

from ..workers.holding import HeldUntilOthersCome
from . import tiny

DEATH = "generation worker on device 1 failed: its process died"


def test_an_engine_killed_while_it_generates_costs_no_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, pooled_workers: None
) -> None:
    """Killed when the first sample is finished; all others are held up until then."""
    options: dict[str, Any] = {
        "models": {"max_position_embeddings": 128},
        "num_devices": 2,
        "total_episodes": 8,
        "response_length": 100,
        "stop_token": None,
        "num_sample_generations": 0,
    }
    undisturbed = tiny.trainer(tmp_path / "undisturbed", **options)
    undisturbed.max_new_tokens = {0: 4}
    undisturbed.train()
    engines: list[int] = []

    def kill_an_engine(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        while engines:
            os.kill(engines.pop(), signal.SIGKILL)
        return tiny.count_a(prompts, responses, target)

    disturbed = tiny.trainer(tmp_path / "disturbed", reward=kill_an_engine, **options)
    disturbed.max_new_tokens = {0: 4}

    class ChooseAnEngine(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engines.append(engine_of_device_1(disturbed))

    disturbed.add_callback(ChooseAnEngine())
    monkeypatch.setattr(generation_handle, "GenerationWorker", HeldUntilOthersCome)
    with caplog.at_level(logging.WARNING):
        disturbed.train()
    assert DEATH in caplog.text
    assert "its samples go on elsewhere" in caplog.text
    assert_same_models(disturbed, undisturbed)


def test_an_engine_that_dies_between_rollouts_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, pooled_workers: None
) -> None:
    """With half of its new weights; when another rollout follows, by the weights that it had; when training follows,
    and then new weights."""
    monkeypatch.setattr(weight_streams, "BUCKET_BYTES", 4096)
    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "num_sample_generations": 1}
    undisturbed = tiny.train(tmp_path / "undisturbed", **options)
    disturbed = tiny.trainer(tmp_path / "disturbed", per_device_eval_batch_size=2, **options)
    disturbed.eval_dataset = tiny.rows(4)
    killed: list[str] = []

    def after_a_death(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def kill_first(*arguments: Any, **keywords: Any) -> Any:
            if disturbed.state.global_step == 1:
                os.kill(engine_of_device_1(disturbed), signal.SIGKILL)
                killed.append(name)
            return function(*arguments, **keywords)

        return kill_first

    disturbed.generate_completions = after_a_death("completions", disturbed.generate_completions)  # type: ignore[method-assign]
    algorithm = disturbed._algorithm
    disturbed._algorithm = replace(algorithm, estimate=after_a_death("estimate", algorithm.estimate))
    load = WeightTakerHandle.load
    num_loaded: Counter[int] = Counter()

    def load_and_kill(engine: WeightTakerHandle, parcels: Sequence[Parcel]) -> Any:
        num_loaded[disturbed.state.global_step] += 1
        if disturbed.state.global_step == 0 and num_loaded[0] == 3:
            os.kill(engine_of_device_1(disturbed), signal.SIGKILL)
            killed.append("load")
        return load(engine, parcels)

    monkeypatch.setattr(WeightTakerHandle, "load", load_and_kill)
    with caplog.at_level(logging.WARNING):
        disturbed.train()
    assert killed == ["load", "completions", "estimate"]
    assert num_loaded[0] > 4, "the others get the rest"
    assert caplog.text.count(DEATH) == 3
    assert_same_models(disturbed, undisturbed)


def test_engines_that_sleep_and_training_that_is_offloaded_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, pooled_workers: None
) -> None:
    """One engine dies asleep, in the first update: another takes its place, with the new weights."""
    options: dict[str, Any] = {"num_devices": 2, "total_episodes": 24, "save_strategy": "steps", "save_steps": 1}
    plain = tiny.train(tmp_path / "plain", **options)
    sharing = tiny.trainer(tmp_path / "sharing", engines_sleep="on", offload_training="on", **options)
    train, sleep, offload = Fleet.train, GenerationHandle.sleep, ModelHandle.offload_training
    calls: Counter[str] = Counter()

    def count_sleep(engine: GenerationHandle) -> Any:
        calls["sleep"] += 1
        return sleep(engine)

    def count_offload(worker: ModelHandle, kept: Sequence[str]) -> Any:
        calls["offload"] += 1
        return offload(worker, kept)

    def train_and_kill(fleet: Fleet, *arguments: Any) -> Any:
        reports = train(fleet, *arguments)
        if not calls["train"]:
            os.kill(engine_of_device_1(sharing), signal.SIGKILL)
        calls["train"] += 1
        return reports

    monkeypatch.setattr(Fleet, "train", train_and_kill)
    monkeypatch.setattr(GenerationHandle, "sleep", count_sleep)
    monkeypatch.setattr(ModelHandle, "offload_training", count_offload)
    with caplog.at_level(logging.WARNING):
        sharing.train()
    assert DEATH in caplog.text
    assert calls["train"] == 3
    assert calls["sleep"] == 2 * (1 + 3)  # before the first update's samples, too
    assert calls["offload"] >= 2 * (1 + 3)
    assert_same_models(sharing, plain)


def engine_of_device_1(trainer: PPOTrainer) -> int:
    """Its process id."""
    assert trainer._fleet is not None
    return trainer._fleet._engines.workers[1].worker.process_id


def assert_same_models(one: PPOTrainer, other: PPOTrainer) -> None:
    assert tiny.difference(one.policy_model, other.policy_model) < tiny.ROUNDING
    assert tiny.difference(one.value_model, other.value_model) < tiny.ROUNDING


def program(output_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run of four updates in a process of its own, which saves each."""
    return subprocess.Popen(
        [sys.executable, "-m", tiny.__name__, str(output_dir), *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_by(process: subprocess.Popen[str], signum: int, *, after: str, go: Path) -> str:
    """Send the signal when the program has printed `after`, and then make the file that it waits for.

    Returns what it said, once all its processes are gone.
    """
    assert process.stdout is not None
    try:
        assert after in iter(process.stdout.readline, ""), "the run ended too early"
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signum)
        go.touch()
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    _, orphans = psutil.wait_procs(children, timeout=300)
    assert not [process for process in orphans if process.status() != psutil.STATUS_ZOMBIE]
    return said


@pytest.mark.processes
def test_sigterm_saves_at_the_end_of_the_update_and_leaves_nothing(tmp_path: Path) -> None:
    """Saving every second update only, it is in the middle of the third."""
    process = program(tmp_path, "--save-steps", "2", "--grace", "120", "--held", "3")
    said = end_by(process, signal.SIGTERM, after="began 3\n", go=tmp_path / "go")
    assert process.returncode == 143
    assert "SIGTERM: the run ends with this update" in said
    assert "Traceback" not in said
    assert (tmp_path / "checkpoint-3" / "state").is_dir()
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path, pooled_workers: None) -> None:
    whole = tiny.train(tmp_path / "whole", total_episodes=32, num_sample_generations=0, num_devices=2)

    output_dir = tmp_path / "killed"
    process = program(output_dir, "--held", "4")  # it does not end
    children: list[psutil.Process] = []
    assert process.stdout is not None
    try:
        assert "saved 2\n" in iter(process.stdout.readline, ""), "the run ended before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _, orphans = psutil.wait_procs(children, timeout=300)  # Ray's agents look for their parent every few seconds
    # Those that lost their parent wait for init to take note of their end.
    assert not [process for process in orphans if process.status() != psutil.STATUS_ZOMBIE]

    resumed = tiny.trainer(output_dir, total_episodes=32, num_sample_generations=0)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.state.log_history) == 4
    assert_same_models(whole, resumed)  # on two devices, and on one twice
    assert not [path.name for path in output_dir.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("pooled_workers")
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

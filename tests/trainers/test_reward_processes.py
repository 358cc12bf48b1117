"""Reward functions in processes: what works there, what is said of processes that die, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fuse.sample import Sample
from fuse.trainers.reward_calls import RewardCalls, RewardSettings
from fuse.trainers.rewards import RewardError

pytestmark = pytest.mark.processes


def decode(tokens: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in tokens]


def rewarded(
    function: Callable[..., Any], count: int = 1, clock: Callable[[], float] = time.monotonic, **settings: Any
) -> list[float | None]:
    """Scores of samples that finish one by one."""
    samples = [Sample(id=40 + index, prompt_ids=(index,), columns={"target": index}) for index in range(count)]
    with RewardCalls(function, decode, RewardSettings(workers="process", **settings), clock=clock) as calls:
        for sample in samples:
            calls.submit([sample])
        calls.finish()
    return [sample.score for sample in samples]


def is_running(process: int) -> bool:
    """Neither gone nor a zombie, whose parent may be a container's first process and never ask."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_ended(*processes: int) -> None:
    while any(map(is_running, processes)):
        time.sleep(0.01)


def test_functions_run_in_the_main_thread_of_other_processes() -> None:
    def where(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        assert threading.current_thread() is threading.main_thread()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(0)
        assert prompts == [str(number) for number in target]
        return [float(os.getpid())] * len(prompts)

    processes = rewarded(where, 8)
    assert os.getpid() not in processes
    assert 1 <= len(set(processes)) <= 4
    assert not any(is_running(int(process or 0)) for process in processes)


def test_what_async_functions_share_lasts_for_the_process() -> None:
    async def limited(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        assert threading.current_thread() is threading.main_thread()
        state = sys.modules["__main__"].__dict__
        semaphore = state.setdefault("semaphore", asyncio.Semaphore(1))
        loop = state.setdefault("loop", asyncio.get_running_loop())
        async with semaphore:
            await asyncio.sleep(0)
        assert loop is asyncio.get_running_loop()
        return [1.0]

    assert rewarded(limited, 9) == [1.0] * 9


def test_an_error_is_told_with_the_traceback() -> None:
    def failing(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        return [float("seven")]

    with pytest.raises(RewardError) as caught:
        rewarded(failing)
    assert str(caught.value) == (
        "reward function failing raised for sample 40 ('0'): ValueError: could not convert string to float: 'seven'"
    )
    assert "in failing" in str(caught.value.__cause__)


def test_a_wrong_answer_is_told_as_from_threads() -> None:
    with pytest.raises(ValueError, match=r"^reward function <lambda> returned None for 1 responses"):
        rewarded(lambda prompts, responses, target: None)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"died \(SIGKILL\)"),
        (lambda: os._exit(3), r"exited \(status 3\)"),
    ],
)
def test_a_process_that_ends_is_one_line(end: Callable[[], None], how: str) -> None:
    def last(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        end()
        return [0.0]

    with pytest.raises(RewardError, match=rf"^reward function last: its process {how} while it rewarded sample 40 "):
        rewarded(last)


def test_where_errors_have_a_score_another_process_goes_on() -> None:
    def fragile(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        if target[0] % 2:
            os._exit(3)
        return [1.0]

    assert rewarded(fragile, 6, error_score=-1.0) == [1.0, -1.0] * 3


def test_a_process_that_does_not_return_is_ended(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def stuck(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        process = os.getpid()
        (begun.parent / "new").write_text(str(process))
        (begun.parent / "new").rename(begun)
        while True:
            pass

    def clock() -> float:
        return 99.0 if begun.exists() else 0.0

    with pytest.raises(RewardError, match=r"^reward function stuck has not returned for sample 40 "):
        rewarded(stuck, clock=clock, timeout_s=99.0)
    assert not is_running(int(begun.read_text()))
    begun.unlink()
    assert rewarded(stuck, clock=clock, timeout_s=99.0, error_score=0.5) == [0.5]
    assert not is_running(int(begun.read_text()))


def test_what_a_function_has_started_ends_with_the_run() -> None:
    def starting(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        return [float(subprocess.Popen(["sleep", "1000000"]).pid)]

    (process,) = rewarded(starting)
    wait_until_ended(int(process or 0))


@pytest.mark.parametrize("busy", ["time.sleep(1e6)", "any(False for _ in iter(int, 1))", "sum(itertools.count())"])
def test_nothing_is_left_when_the_trainer_is_killed(busy: str) -> None:
    """The last one keeps the interpreter's lock for good."""
    program = f"""
        import itertools, os, subprocess, time
        from fuse.sample import Sample
        from fuse.trainers.reward_calls import RewardCalls, RewardSettings

        def stuck(prompts, responses):
            child = subprocess.Popen(["sleep", "1000000"])
            os.write(1, f"{{os.getpid()}} {{child.pid}}\\n".encode())
            {busy}

        decode = lambda texts: ["text"] * len(texts)
        with RewardCalls(stuck, decode, RewardSettings(workers="process")) as calls:
            calls.submit([Sample(id=3, prompt_ids=(1,))])
            calls.finish()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        processes = [int(word) for word in trainer.stdout.readline().split()]
        assert all(map(is_running, processes))
        trainer.kill()
        wait_until_ended(*processes)


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    """As `multiprocessing` would, which imports it in every process."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from fuse.sample import Sample
            from fuse.trainers.reward_calls import RewardCalls, RewardSettings

            print("run")
            def double(prompts, responses):
                return [2.0 for _ in prompts]

            sample = Sample(id=3, prompt_ids=(1,))
            with RewardCalls(double, lambda texts: ["text"] * len(texts), RewardSettings(workers="process")) as calls:
                calls.submit([sample])
                calls.finish()
            print(sample.score)
        """)
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (ended.stdout.split(), ended.returncode) == (["run", "2.0"], 0), ended.stderr


def test_a_function_that_cannot_be_sent_is_refused() -> None:
    lock = threading.Lock()

    def locked(prompts: list[str], responses: list[str]) -> list[float]:
        with lock:
            return [1.0]

    with pytest.raises(ValueError, match=r"^reward function locked cannot be sent .*reward_workers='thread'"):
        RewardCalls(locked, decode, RewardSettings(workers="process"))


def test_a_function_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("no_file_of_this_name")
    exec("def score(prompts, responses, target): return [1.0]", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    message = "^reward function score cannot be loaded in a process of its own .ModuleNotFoundError: .*Python path"
    with pytest.raises(ValueError, match=message):
        rewarded(module.score, error_score=0.0)

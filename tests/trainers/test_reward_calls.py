"""Reward functions that are slow, never return, or fail for some samples, called from threads."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Coroutine, Sequence

import pytest

from fuse.sample import Sample
from fuse.trainers import reward_calls
from fuse.trainers.reward_calls import RewardCalls, RewardSettings
from fuse.trainers.reward_thread import RewardThread
from fuse.trainers.rewards import RewardError


class Clock:
    """Seconds that tests set; every reading takes `step_s`."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s, self._step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s


def sample(number: int) -> Sample:
    return Sample(id=number, prompt_ids=(number,))


def decode(tokens: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in tokens]


def test_a_function_that_never_returns_is_an_error_that_names_it() -> None:
    clock, release = Clock(), threading.Event()

    def stuck(prompts: list[str], responses: list[str]) -> list[float]:
        clock.now_s = 99.0
        release.wait()
        return [0.0]

    with (
        pytest.raises(RewardError, match=r"^reward function stuck has not returned for sample 7 \('7'\) with") as got,
        RewardCalls(stuck, decode, RewardSettings(timeout_s=99.0), clock=clock) as calls,
    ):
        calls.submit([sample(7)])
        calls.finish()
    release.set()
    assert "reward_timeout_s=99: " in str(got.value)


@pytest.mark.processes
def test_the_interpreter_ends_although_the_function_does_not() -> None:
    program = """
        import threading
        from fuse.sample import Sample
        from fuse.trainers.reward_calls import RewardCalls

        now = [0.0]

        def stuck(prompts, responses):
            now[0] = 3600.0
            threading.Event().wait()

        with RewardCalls(stuck, lambda texts: ["text"] * len(texts), clock=lambda: now[0]) as calls:
            calls.submit([Sample(id=3, prompt_ids=(1,))])
            calls.finish()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        "fuse.trainers.rewards.RewardError: reward function stuck has not returned for sample 3 ('text')"
    )


def test_what_takes_long_is_warned_of_after_a_minute_and_then_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_calls, "_TICK_S", 0.0)
    release, warnings = threading.Event(), []

    class Third(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())
            if len(warnings) == 3:
                release.set()

    def slow(prompts: list[str], responses: list[str]) -> list[float]:
        release.wait()
        return [1.0] * len(prompts)

    logger, handler = logging.getLogger("fuse.trainers.reward_calls"), Third()
    logger.addHandler(handler)
    try:
        with RewardCalls(slow, decode, RewardSettings(timeout_s=1e9), clock=Clock(step_s=1.0)) as calls:
            calls.submit([sample(4), sample(5)])
            calls.finish()
    finally:
        logger.removeHandler(handler)
    pattern = (
        r"waiting for reward function slow, which has not returned for samples 4, 5 \('4'\) in (\d+) s: reward_tim"
    )
    seconds = [int(match[1]) for text in warnings if (match := re.match(pattern, text))]
    assert len(seconds) == len(warnings)
    assert 60 <= seconds[0] < 120 <= seconds[1] < 240 <= seconds[2]


def test_samples_that_fail_get_the_score_for_errors_each_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    def picky(prompts: list[str], responses: list[str]) -> list[float]:
        if "5" in prompts or "6" in prompts:
            raise KeyError("answer")
        return [float(prompt) for prompt in prompts]

    samples = [sample(number) for number in range(3, 8)]
    with RewardCalls(picky, decode, RewardSettings(error_score=-2.0)) as calls:
        calls.submit(samples)
        assert calls.finish() == {"rewards/errors": 2.0}
        assert [one.score for one in samples] == [3.0, 4.0, -2.0, -2.0, 7.0]
        (line,) = caplog.messages
        assert line.startswith("2 samples are scored reward_error_score=-2: reward function picky raised for sample 5")
        calls.submit([sample(1)])
        assert calls.finish() == {"rewards/errors": 0.0}, "of each update by itself"


def test_without_a_score_for_errors_nothing_is_counted() -> None:
    with RewardCalls(lambda prompts, responses: [1.0], decode) as calls:
        calls.submit([sample(1)])
        assert calls.finish() == {}
    with RewardCalls(None, decode, RewardSettings(error_score=0.0)) as calls:
        calls.submit([sample(1)])
        assert calls.finish() == {}


def test_a_wrong_answer_is_no_error_that_is_scored() -> None:
    with (
        pytest.raises(ValueError, match="return a finite number"),
        RewardCalls(lambda prompts, responses: [float("nan")], decode, RewardSettings(error_score=0.0)) as calls,
    ):
        calls.submit([sample(1)])
        calls.finish()


def test_however_many_calls_do_not_return_others_are_made() -> None:
    clock, release, stuck = Clock(), threading.Event(), threading.Semaphore(0)

    def sometimes_stuck(prompts: list[str], responses: list[str]) -> list[float]:
        if prompts != ["0"]:
            clock.now_s += 99.0
            stuck.release()
            release.wait()
        return [1.0]

    samples = [sample(number) for number in range(1, 20)]
    with RewardCalls(sometimes_stuck, decode, RewardSettings(timeout_s=99.0, error_score=0.5), clock=clock) as calls:
        for one in samples:
            calls.submit([one])
        assert calls.finish() == {"rewards/errors": 19.0}
        assert {one.score for one in samples} == {0.5}
        for _ in samples:
            stuck.acquire()  # the clock stands still from now on
        last = sample(0)
        calls.submit([last])
        assert calls.finish() == {"rewards/errors": 0.0}
        assert last.score == 1.0
    release.set()


def test_what_is_awaited_too_long_is_cancelled() -> None:
    clock, cancelled = Clock(), threading.Event()

    async def stuck(prompts: list[str], responses: list[str]) -> list[float]:
        clock.now_s = 99.0
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return [0.0]

    with RewardCalls(stuck, decode, RewardSettings(timeout_s=99.0, error_score=0.5), clock=clock) as calls:
        calls.submit([sample(1)])
        assert calls.finish() == {"rewards/errors": 1.0}
        cancelled.wait()


def test_what_is_awaited_only_once_the_time_is_over_is_cancelled() -> None:
    async def stuck() -> list[float]:
        await asyncio.Event().wait()
        return [0.0]

    def slow(prompts: list[str], responses: list[str]) -> Coroutine[None, None, list[float]]:
        thread.kill()
        return stuck()

    thread = RewardThread(slow)
    with pytest.raises(RewardError, match=r"^reward function .*slow raised for .*: CancelledError$"):
        thread.call(["prompt"], ["response"], [{}], [1])


def test_functions_that_use_signals_are_told_of_processes() -> None:
    def timed(prompts: list[str], responses: list[str]) -> list[float]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [1.0]

    with (
        pytest.raises(RewardError, match=r"^reward function timed raised for .* signal only works in main th") as got,
        RewardCalls(timed, decode) as calls,
    ):
        calls.submit([sample(1)])
        calls.finish()
    assert str(got.value).endswith(": set reward_workers='process', where functions run in a main thread")

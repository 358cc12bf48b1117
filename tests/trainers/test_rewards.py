"""Reward functions: how they are called, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fuse.sample import Sample
from fuse.trainers.reward_calls import RewardCalls
from fuse.trainers.rewards import RewardError, call_reward_function

PROMPTS, RESPONSES = ["one", "two"], ["a", "b"]


def call(function: Callable[..., Any]) -> list[float]:
    return call_reward_function(function, PROMPTS, RESPONSES, [{}, {}])


def rewarded(function: Callable[..., Any], count: int) -> list[float]:
    """Scores of samples that finish one by one."""
    samples = [Sample(id=40 + index, prompt_ids=(1,), columns={}) for index in range(count)]
    with RewardCalls(function, lambda texts: ["text"] * len(texts)) as calls:
        for sample in samples:
            calls.submit([sample])
        calls.finish()
    return [sample.score for sample in samples]


def test_what_async_functions_share_lasts_for_the_whole_run() -> None:
    """A semaphore belongs to the loop in which it first makes somebody wait."""
    shared = SimpleNamespace(semaphore=asyncio.Semaphore(1), running=0, most=0, threads=set())

    async def limited(prompts: list[str], responses: list[str]) -> list[float]:
        async with shared.semaphore:
            shared.running += 1
            shared.most = max(shared.most, shared.running)
            await asyncio.sleep(0.01)
            shared.running -= 1
        shared.threads.add(threading.get_ident())
        return [1.0] * len(responses)

    for _ in range(2):  # updates
        assert rewarded(limited, 4) == [1.0] * 4
    assert shared.most == 1
    assert len(shared.threads) == 1
    assert threading.get_ident() not in shared.threads


def test_async_functions_are_called_where_a_loop_runs_already() -> None:
    async def ones(prompts: list[str], responses: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(responses)

    async def cell_of_a_notebook() -> list[float]:
        return call(ones)

    assert asyncio.run(cell_of_a_notebook()) == [1.0, 1.0]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [ValueError("bad\nlines"), KeyError("answer"), SystemExit(3)])
def test_an_error_says_where_and_what(error: BaseException, is_async: bool) -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise error

    async def score_later(prompts: list[str], responses: list[str]) -> list[float]:
        raise error

    with pytest.raises(RewardError) as caught:
        rewarded(score_later if is_async else score, 1)
    name = "score_later" if is_async else "score"
    what = f"{type(error).__name__}: {error}".replace("\n", " ")
    assert str(caught.value) == f"reward function {name} raised for sample 40 ('text'): {what}"
    assert caught.value.__cause__ is error
    assert not isinstance(caught.value, (ValueError, OSError)), "the input is not to blame"


def test_the_loop_goes_on_when_a_function_ends_it() -> None:
    async def leave(prompts: list[str], responses: list[str]) -> list[float]:
        sys.exit("no key")

    async def ones(prompts: list[str], responses: list[str]) -> list[float]:
        return [1.0, 1.0]

    with pytest.raises(RewardError, match="SystemExit: no key"):
        call(leave)
    assert call(ones) == [1.0, 1.0]


def test_an_error_names_all_samples_of_the_call() -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise RuntimeError

    with pytest.raises(RewardError, match=r"^reward function score raised for samples 0, 1 .'one'.: RuntimeError$"):
        call(score)


def _generated() -> Iterator[float]:
    yield 1.0
    yield 2.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"returned float 0\.5 for 2 responses: return a list of one number per response"),
        (None, "returned None for 2 responses: return a list"),
        (np.float32(0.5), "returned float32 for 2 responses: return a list"),
        (torch.tensor(0.5), "returned Tensor for 2 responses: return a list"),
        (_generated(), "returned generator for 2 responses: return a list"),
        (map(float, "12"), "returned map for 2 responses: return a list"),
        ("12", "returned str '12' for 2 responses: return a list"),
        ({"a": 1.0, "b": 2.0}, "returned dict for 2 responses: return a list"),
        ({1.0, 2.0}, "returned set for 2 responses: return a list"),
        (["1", "2"], r"returned '1' for response 0 \('a'\): return a finite number"),
        ([0.0, None], r"returned None for response 1 \('b'\): return a finite number"),
        ([0.0, [1.0]], r"returned \[1.0\] for response 1"),
        ([0.0, float("nan")], "returned nan for response 1"),
        ([1.0], "returned 1 rewards for 2 responses"),
        (np.ones(3), "returned 3 rewards for 2 responses"),
    ],
)
def test_what_is_no_list_of_numbers_is_one_clear_line(returned: Any, message: str) -> None:
    def score(prompts: list[str], responses: list[str]) -> Any:
        return returned

    with pytest.raises(ValueError, match=f"^reward function score {message}") as caught:
        call(score)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "returned", [[1, True], (1.0, 1.0), np.ones(2), torch.ones(2), [torch.tensor(1.0), np.int64(1)]]
)
def test_numbers_come_in_many_types(returned: Sequence[Any]) -> None:
    assert call(lambda prompts, responses: returned) == [1.0, 1.0]

"""Listeners hear of other work soon, of the same work every few seconds, and of what is brief not at all."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from fuse import activity
from fuse.activity import SILENCE_S, Activity


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(activity, "time", SimpleNamespace(monotonic=lambda: now[0]))  # others look at the real one
    return now


def test_other_work_is_told_soon_and_the_same_again_and_again(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    told = Activity()
    told.listen(heard.append)
    with caplog.at_level(logging.INFO, "fuse.activity"):
        told.tell("generating: 0 of 8")
        for tenth in range(1, 121):  # twelve seconds
            clock[0] = 100 + tenth / 10
            told.tell(f"generating: {tenth // 20} of 8")
        told.tell("training")
    assert heard[:3] == ["generating: 0 of 8", "generating: 2 of 8 (4 s)", "generating: 4 of 8 (9 s)"]
    assert heard[3:] == ["training"]
    assert caplog.messages == heard


def test_what_is_told_within_a_larger_work_begins_with_that(clock: list[float]) -> None:
    heard: list[str] = []
    told = Activity()
    told.listen(heard.append)
    with told.part_of("reference responses after 8 of 16"):
        told.tell("generating: 0 of 8 samples")
    clock[0] += 2
    told.tell("training")
    assert heard == ["reference responses after 8 of 16, generating: 0 of 8 samples", "training"]


def test_what_is_brief_is_passed_over(clock: list[float]) -> None:
    heard: list[str] = []
    told = Activity()
    told.listen(heard.append)
    for number in range(100):  # ten seconds of updates of a tenth each
        clock[0] = 100 + number / 10
        told.tell("generating")
        told.tell("training")
    assert 9 <= len(heard) <= 11


def test_it_speaks_up_by_itself_for_as_long_as_it_lasts(clock: list[float]) -> None:
    heard: list[str] = []
    told = Activity()
    told.listen(heard.append)
    told.tell("training")
    with told.lasting():
        while len(heard) < 3:
            clock[0] += SILENCE_S
    count = len(heard)
    assert heard[0] == "training"
    assert all(line.startswith("training (") for line in heard[1:])
    clock[0] += 100
    assert len(heard) == count

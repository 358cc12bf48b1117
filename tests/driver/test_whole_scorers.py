"""Devices that share an engine share what it is to see to."""

from __future__ import annotations

from typing import Any

import pytest

from fuse.driver.score_flow import WholeScorers
from fuse.training.reading import TokenSequence


class Answer:
    def __init__(self, results: Any) -> None:
        self.result = lambda: results


class Pending(dict[Any, Any]):
    """What is done at the end of calls, by call."""

    expect = dict.__setitem__


class Scorer:
    """Says of a sequence how long it is, and by whom it was read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: list[list[int]] = []

    def infer(self, sequences: list[TokenSequence]) -> Any:
        self.given.append([len(one) for one in sequences])
        return Answer([(self.name, len(one)) for one in sequences])


def sequences(*lengths: int) -> list[TokenSequence]:
    return [TokenSequence((1,), (2,) * (length - 1)) for length in lengths]


def test_every_sequence_is_scored_once_and_in_its_place() -> None:
    workers: list[Any] = [Scorer(name) for name in "abcd"]
    pending: Any = Pending()
    heard: list[Any] = []
    scorers = WholeScorers(workers, 2, pending)
    scorers.put(1, sequences(9, 3, 7, 5), heard.extend)
    assert [one.given for one in workers] == [[], [], [[9, 3]], [[7, 5]]]
    assert scorers.late(1) is workers[2]
    first, second = list(pending)
    pending.pop(second)()
    assert not heard, "half of them"
    assert scorers.late(1) is workers[2]
    pending.pop(first)()
    assert heard == [("c", 9), ("c", 3), ("d", 7), ("d", 5)]


@pytest.mark.parametrize("num_engines", [1, 2])
def test_one_sequence_needs_one_device(num_engines: int) -> None:
    workers: list[Any] = [Scorer(name) for name in "ab"]
    pending: Any = Pending()
    heard: list[Any] = []
    WholeScorers(workers, num_engines, pending).put(0, sequences(4), heard.extend)
    ((_, then),) = pending.items()
    then()
    assert heard == [("a", 4)]
    assert workers[1].given == []

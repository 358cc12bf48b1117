"""Handles are in step with their workers: the same methods, arguments and results, passed on to the method meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import ray
import torch

from fuse.workers.calls import Future
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.model_handle import ModelHandle
from fuse.workers.model_worker import ModelWorker
from fuse.workers.weight_port import Membership
from fuse.workers.weight_taker import WeightTaker, WeightTakerHandle

IMPORTED_FOR_TYPES = {"torch": torch, "Parcel": Parcel, "Membership": Membership}
OWN = {"spawn", "spawn_follower", "warm"}
PAIRS = [(GenerationHandle, GenerationWorker), (ModelHandle, ModelWorker), (WeightTakerHandle, WeightTaker)]


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    return dict(inspect.getmembers(cls, lambda member: inspect.isfunction(member) and member.__name__[0] != "_"))


def own_methods(worker: type) -> dict[str, Callable[..., Any]]:
    """Without those of what takes weights, which has a handle of its own."""
    inherited = methods(WeightTaker) if worker is GenerationWorker else {}
    return {name: method for name, method in methods(worker).items() if name not in inherited}


METHODS = [
    pytest.param(handle, method, id=f"{handle.__name__}.{name}")
    for handle, worker in PAIRS
    for name, method in own_methods(worker).items()
]


class Recorder:
    """Stands in for the worker's process."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        self.calls.append((method, args, kwargs))
        return "future"


def value_of(parameter: Any) -> Any:
    """What the worker gets of an argument of this type: of a `Remote`, the value."""
    if get_origin(parameter) is Union:
        value, *others = get_args(parameter)
        if others == [ray.ObjectRef[value]]:
            return value
    return parameter


@pytest.mark.parametrize(("handle", "worker"), PAIRS)
def test_a_handle_has_the_worker_s_methods_and_no_others(handle: type, worker: type) -> None:
    assert methods(handle).keys() - OWN == own_methods(worker).keys()


@pytest.mark.parametrize(("handle", "method"), METHODS)
def test_a_call_is_passed_on_with_its_arguments_in_order(handle: Any, method: Callable[..., Any]) -> None:
    recorder = Recorder()
    _, *parameters = inspect.signature(method).parameters
    arguments = [object() for _ in parameters]
    named = dict(zip(parameters, arguments, strict=True))
    assert getattr(handle(recorder), method.__name__)(**named) == "future"
    ((called, args, kwargs),) = recorder.calls
    assert called is method
    assert inspect.signature(method).bind(None, *args, **kwargs).arguments == {"self": None, **named}


@pytest.mark.parametrize(("handle", "method"), METHODS)
def test_types_and_defaults_are_those_of_the_worker(handle: type, method: Callable[..., Any]) -> None:
    own = getattr(handle, method.__name__)
    expected, actual = (get_type_hints(one, localns=IMPORTED_FOR_TYPES) for one in (method, own))
    assert actual.pop("return") == Future[expected.pop("return")]
    assert {name: value_of(one) for name, one in actual.items()} == expected
    defaults = [one.default for one in inspect.signature(method).parameters.values()]
    assert [one.default for one in inspect.signature(own).parameters.values()] == defaults


def test_methods_that_may_block_exist() -> None:
    assert GenerationWorker.concurrent_methods <= methods(GenerationWorker).keys()

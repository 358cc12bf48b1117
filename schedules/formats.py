"""Exact text and JSON forms of problems and schedules: what is read equals what was written.

Text, one fact per line, for reading, diffs and golden files:

    schedule 1
    num_ranks 2
    memory_limit_bytes 10 10
    initial_bytes 0 0
    pipeline actor
    ranks 0 1
    num_micro_batches 2
    forward_ticks 1 1
    backward_ticks 2 2
    activation_bytes 1 1
    weight_grad_bytes 0 0
    transfer_ticks 0
    rank 0: F0.0.0 F0.0.1 B0.0.0 B0.0.1
    rank 1: F0.1.0 B0.1.0 F0.1.1 B0.1.1

Fields that are absent in the value (no limits, no split backward) are left out. A problem's text has no rank orders.

Version 2 has forward-only pipelines, whose `backward_ticks` are followed by nothing, with or without `before 0`. What
has none is written as version 1, which older readers know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

from schedules.ir import Op, Pipeline, Problem, Schedule

VERSION = 2

_PROBLEM_FIELDS = tuple(field.name for field in fields(Problem) if field.name != "pipelines")
_PIPELINE_FIELDS = tuple(field.name for field in fields(Pipeline))
_SCALARS = frozenset({"num_ranks", "num_micro_batches", "transfer_ticks", "before"})
_T = TypeVar("_T")


def problem_to_json(problem: Problem) -> dict[str, object]:
    """A JSON object; `problem_from_json` reads it back."""
    return {"problem": _version(problem), **_problem_object(problem)}


def schedule_to_json(schedule: Schedule) -> dict[str, object]:
    """A JSON object; `schedule_from_json` reads it back."""
    orders = [[str(op) for op in order] for order in schedule.ranks]
    return {"schedule": _version(schedule.problem), **_problem_object(schedule.problem), "orders": orders}


def problem_from_json(value: object) -> Problem:
    """Read a problem.

    Raises:
        ValueError: the object is not a problem of this version, or its values break a rule of the problem.
    """
    members = _members(value, "problem")
    version = _take_version(members, "problem")
    return _problem_from_members(members, version)


def schedule_from_json(value: object) -> Schedule:
    """Read a schedule; whether it is legal is for `schedules.validate` to say.

    Raises:
        ValueError: the object is not a schedule of this version, or its problem breaks a rule.
    """
    members = _members(value, "schedule")
    version = _take_version(members, "schedule")
    orders = members.pop("orders", None)
    if not isinstance(orders, list) or not all(isinstance(order, list) for order in orders):
        raise ValueError("schedule: orders must be one list of operations per rank")
    ops = tuple(tuple(Op.parse(str(op)) for op in order) for order in orders)
    return Schedule(_problem_from_members(members, version), ops)


def problem_to_text(problem: Problem) -> str:
    """Lines as in the module's docstring, without rank orders."""
    return "\n".join([f"problem {_version(problem)}", *_problem_lines(problem)]) + "\n"


def schedule_to_text(schedule: Schedule) -> str:
    """Lines as in the module's docstring."""
    orders = [" ".join([f"rank {rank}:", *map(str, order)]) for rank, order in enumerate(schedule.ranks)]
    return "\n".join([f"schedule {_version(schedule.problem)}", *_problem_lines(schedule.problem), *orders]) + "\n"


def problem_from_text(text: str) -> Problem:
    """Read what `problem_to_text` writes.

    Raises:
        ValueError: a line has another form (the message has its number), or a value breaks a rule of the problem.
    """
    members, orders = _read_lines(text, "problem")
    if orders:
        raise ValueError("problem: rank orders belong to a schedule; start the text with 'schedule 1'")
    return problem_from_json(members)


def schedule_from_text(text: str) -> Schedule:
    """Read what `schedule_to_text` writes.

    Raises:
        ValueError: a line has another form (the message has its number), or a value breaks a rule of the problem.
    """
    members, orders = _read_lines(text, "schedule")
    return schedule_from_json({**members, "orders": orders})


def _problem_object(problem: Problem) -> dict[str, object]:
    return {
        **_field_values(problem, _PROBLEM_FIELDS),
        "pipelines": [_field_values(pipeline, _PIPELINE_FIELDS) for pipeline in problem.pipelines],
    }


def _field_values(value: object, names: tuple[str, ...]) -> dict[str, object]:
    present = ((name, getattr(value, name)) for name in names)
    return {name: list(item) if isinstance(item, tuple) else item for name, item in present if item is not None}


def _problem_from_members(members: dict[str, object], version: int) -> Problem:
    pipelines = members.pop("pipelines", None)
    if not isinstance(pipelines, list):
        raise ValueError("problem: pipelines must be a list of objects")
    parsed = tuple(_construct(Pipeline, _members(item, "pipeline"), _PIPELINE_FIELDS) for item in pipelines)
    problem = _construct(Problem, {**members, "pipelines": parsed}, (*_PROBLEM_FIELDS, "pipelines"))
    if version < _version(problem):
        raise ValueError(f"problem: forward-only pipelines are of version {_version(problem)}, not {version}")
    return problem


def _construct(make: Callable[..., _T], members: Mapping[str, object], known: tuple[str, ...]) -> _T:
    owner = getattr(make, "__name__", "value").lower()
    unknown = sorted(set(members) - set(known))
    if unknown:
        raise ValueError(f"{owner}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    values = {name: tuple(item) if isinstance(item, list) else item for name, item in members.items()}
    required = {field.name for field in fields(make) if field.default is field.default_factory}  # type: ignore[arg-type]
    absent = sorted(required - set(values))
    if absent:
        raise ValueError(f"{owner}: field {absent[0]!r} is absent; add it")
    return make(**values)


def _members(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: expected an object, not {type(value).__name__}")
    return dict(value)


def _take_version(members: dict[str, object], what: str) -> int:
    version = members.pop(what, None)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise ValueError(f"{what}: format version is {version!r}; this reader knows 1 to {VERSION}")
    return version


def _version(problem: Problem) -> int:
    """The first that can say this."""
    return 2 if any(pipeline.is_forward_only for pipeline in problem.pipelines) else 1


def _problem_lines(problem: Problem) -> list[str]:
    lines = [_line(name, item) for name, item in _field_values(problem, _PROBLEM_FIELDS).items()]
    for pipeline in problem.pipelines:
        values = _field_values(pipeline, _PIPELINE_FIELDS)
        lines.append(f"pipeline {values.pop('name')}")
        lines.extend(_line(name, item) for name, item in values.items())
    return lines


def _line(name: str, item: object) -> str:
    return f"{name} {' '.join(map(str, item)) if isinstance(item, list) else item}".rstrip()


def _read_lines(text: str, what: str) -> tuple[dict[str, object], list[list[str]]]:
    members: dict[str, object] = {}
    pipelines: list[dict[str, object]] = []
    orders: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, *words = line.split() or [""]
        target = pipelines[-1] if pipelines else members
        if name == "rank" and words:
            if words[0] != f"{len(orders)}:":
                raise ValueError(f"{what}: line {number}: expected 'rank {len(orders)}:', found {line[:40]!r}")
            orders.append(words[1:])
        elif name == "pipeline" and len(words) == 1:
            pipelines.append({"name": words[0]})
        elif not orders and name not in target and name not in ("", "name", "pipelines", "orders"):
            target[name] = _integers(words, name in _SCALARS or name == what, f"{what}: line {number}")
        else:
            raise ValueError(f"{what}: line {number}: {line[:40]!r} does not belong here")
    return {**members, "pipelines": pipelines}, orders


def _integers(words: list[str], scalar: bool, where: str) -> int | list[int]:
    try:
        values = [int(word) for word in words]
    except ValueError:
        raise ValueError(f"{where}: expected integers, found {' '.join(words)[:40]!r}") from None
    if scalar and len(values) != 1:
        raise ValueError(f"{where}: expected one integer, found {len(values)}")
    return values[0] if scalar else values

"""Whether a dataset has the columns that a reward function takes, and no others. One clear line where not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from inspect import Parameter
from typing import Any

from fuse.trainers.data import REWARD_ARGUMENTS
from fuse.trainers.prompts import NOT_COLUMNS
from fuse.trainers.rewards import RewardFunction, function_name

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_FORM = "(prompts, responses, **columns)"


def check_reward_columns(function: RewardFunction, dataset: Iterable[Mapping[str, Any]], argument: str) -> None:
    """Whether `function` can be called with the columns of `dataset`, which is the trainer's argument of that name.

    Raises:
        ValueError: a column named like one of the two arguments that are no columns; an argument without a column; a
            column without an argument; rows with different columns, or none; a function that takes no prompts and
            responses.
    """
    columns = _columns(dataset, argument)
    name = function_name(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # native code that does not tell
        parameters = [Parameter("texts", Parameter.VAR_POSITIONAL), Parameter("columns", Parameter.VAR_KEYWORD)]
    kinds = {parameter.kind for parameter in parameters}
    by_position = [parameter for parameter in parameters if parameter.kind in _BY_POSITION]
    if len(by_position) < 2 and Parameter.VAR_POSITIONAL not in kinds:
        raise ValueError(
            f"reward function {name} takes {len(by_position)} arguments by position, and is called with prompts and "
            f"responses: define it as {_FORM}"
        )
    texts = by_position[:2]
    others = [parameter for parameter in parameters if parameter not in texts]
    taken = REWARD_ARGUMENTS | {parameter.name for parameter in texts if parameter.kind in _BY_NAME}
    for column in columns:
        if column in taken:
            raise ValueError(
                f"{argument} has a column {column!r}, which is what reward function {name} gets prompts or responses "
                f"as: rename the column"
            )
    for parameter in others:
        needed = parameter.kind in (*_BY_POSITION, *_BY_NAME) and parameter.default is Parameter.empty
        if needed and parameter.name not in columns:
            raise ValueError(
                f"{argument} has no column {parameter.name!r} (it has: {', '.join(columns) or 'none'}), which reward "
                f"function {name} needs: add it, or give the argument a default"
            )
    accepted = {parameter.name for parameter in others if parameter.kind in _BY_NAME}
    for column in columns:
        if column not in accepted and Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(
                f"reward function {name} does not take column {column!r} of {argument}: define it as {_FORM}, or "
                f"remove the column"
            )


_NAMED = ("prompts", "completions", "completion_ids", "trainer_state")
_LOGS = ("log_metric", "log_extra")


def check_named_arguments(
    function: RewardFunction, dataset: Iterable[Mapping[str, Any]], argument: str, *, in_process: bool
) -> None:
    """Whether `function` can be called as TRL's trainers call it: by name, with the columns of `dataset` and more.

    in_process: it then cannot be given what logs for it.

    Raises:
        ValueError: a column named like another argument; an argument that it does not take, or that there is not.
    """
    name = function_name(function)
    columns = [column for column in _columns(dataset, argument) if column != "prompt"]
    for column in columns:
        if column in (*_NAMED, *_LOGS):
            raise ValueError(f"{argument} has a column {column!r}, an argument of every reward function: rename it")
    given = {*_NAMED, *columns, *(() if in_process else _LOGS)}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # native code that does not tell
        return
    by_name = {parameter.name: parameter for parameter in parameters if parameter.kind in _BY_NAME}
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_any and (missing := sorted(given - by_name.keys())):
        raise ValueError(
            f"reward function {name} does not take {missing[0]!r}, which it is given: define it as "
            f"(prompts, completions, **kwargs)"
        )
    for parameter in by_name.values():
        if parameter.default is Parameter.empty and parameter.name not in given:
            remedy = "add it, or give the argument a default"
            if parameter.name in _LOGS:
                remedy = "it is given in threads alone: set reward_workers='thread'"
            raise ValueError(
                f"{argument} has no column {parameter.name!r}, which reward function {name} needs: {remedy}"
            )


def takes_column(function: RewardFunction, column: str) -> bool:
    """Whether `function` can be called with a dataset's column of this name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # native code that does not tell
        return True
    texts = [parameter for parameter in parameters if parameter.kind in _BY_POSITION][:2]
    return any(
        parameter.kind is Parameter.VAR_KEYWORD
        or (parameter.name == column and parameter.kind in _BY_NAME and parameter not in texts)
        for parameter in parameters
    )


def _columns(dataset: Iterable[Mapping[str, Any]], argument: str) -> list[str]:
    """What samples carry of each row, beside its prompt."""
    names: list[str] | None = getattr(dataset, "column_names", None)  # of a datasets.Dataset, whose rows are alike
    if names is None:
        rows = iter(dataset)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{argument} is empty: pass rows with `input_ids`")
        names = list(first)
        for index, row in enumerate(rows, start=1):
            if row.keys() != set(names):
                raise ValueError(
                    f"row {index} of {argument} has the columns {', '.join(row)} and row 0 {', '.join(names)}: give "
                    f"every row the same, with None where there is nothing"
                )
    return [name for name in names if name not in NOT_COLUMNS]

"""A reward function named on the command line as `module:function`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from fuse.trainers.rewards import RewardFunction


def load_reward_function(name: str) -> RewardFunction:
    """Import `module:function`; modules are found in the current directory too.

    Raises:
        ValueError: the name has another form, there is no such module or function, or it is not callable.
    """
    module_name, separator, function_name = name.partition(":")
    if not (module_name and separator and function_name):
        raise ValueError(f"--reward-function {name!r} is not of the form module:function, e.g. rewards:exact_match")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and what it imports does not
        raise ValueError(
            f"--reward-function: no module {module_name!r} in {here} or on the Python path: "
            "run in its directory, or set PYTHONPATH"
        ) from error
    function: RewardFunction | None = getattr(module, function_name, None)
    if not callable(function):
        fault = "is not a function" if function is not None else "does not exist"
        raise ValueError(f"--reward-function: {function_name!r} {fault} in {module.__file__}: define it there")
    return function

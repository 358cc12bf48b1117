"""A test without the marker `processes` starts none, however it tries."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import ray

STARTS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run([sys.executable, "--version"]),
    "system": lambda: os.system("true"),
    "fork": os.fork,
    "spawn": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "forkserver": lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
    "ray": lambda: ray.init(address="local", num_cpus=1, include_dashboard=False),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.own_ray
def test_a_test_without_the_marker_starts_no_process(start: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"starts a process .*mark it with pytest\.mark\.processes"):
        STARTS[start]()


@pytest.mark.processes
def test_one_with_the_marker_may() -> None:
    assert subprocess.run([sys.executable, "--version"], capture_output=True).returncode == 0

"""For all tests: the same generated examples every time, and native code of another build where it is asked for.

FUSE_SCHEDULES_NATIVE=DIR, FUSE_TENSOR_NATIVE=DIR: where the `_native` module of `schedules`, of `fuse`, is taken from,
as `make test-debug` and `make test-native-sanitized` have it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, however busy the machine: a change fails for what it changes.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("suite")


def _use(package: ModuleType, directory: str) -> None:
    (path,) = Path(directory).glob("_native*.so")
    name = f"{package.__name__}._native"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    vars(package)["_native"] = module
    spec.loader.exec_module(module)


for _variable, _package in (("FUSE_SCHEDULES_NATIVE", "schedules"), ("FUSE_TENSOR_NATIVE", "fuse")):
    if _variable in os.environ:
        _use(importlib.import_module(_package), os.environ[_variable])


# What runs keep in the user's cache is this session's alone.
_CACHE = tempfile.TemporaryDirectory(prefix="fuse-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(autouse=True)
def _nothing_is_known_of_earlier_runs() -> None:
    """What one test's training has measured plans no other's."""
    shutil.rmtree(Path(_CACHE.name) / "fuse" / "profiles", ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """A real model; tests of it are skipped where it cannot be made."""
    from fuse.benchmarks.smollm2 import model_directory

    try:
        return model_directory()
    except ValueError as error:
        pytest.skip(str(error))

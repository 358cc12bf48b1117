"""Native code of another build, as `make test-debug` and `make test-native-sanitized` have it, for all tests.

FUSE_SCHEDULES_NATIVE=DIR, FUSE_TENSOR_NATIVE=DIR: where the `_native` module of `schedules`, of `fuse`, is taken from.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


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

"""For all tests: the same generated examples every time, one Ray cluster, processes only where a test says so, and
native code of another build where it is asked for.

FUSE_SCHEDULES_NATIVE=DIR, FUSE_TENSOR_NATIVE=DIR: where the `_native` module of `schedules`, of `fuse`, is taken from,
as `make test-debug` and `make test-native-sanitized` have it. FUSE_EXAMPLES=N: so many examples, as `make check`
has it.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from fuse.garbage import collect_rarely

from . import marked, process_guard

if TYPE_CHECKING:
    from .worker_pool import WorkerPool

gc.disable()  # until the first test: what is imported for all of them is none
collect_rarely()

# The same examples every time, however busy the machine: a change fails for what it changes.
settings.register_profile(
    "suite",
    max_examples=int(os.environ.get("FUSE_EXAMPLES", 40)),
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


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_no_garbage() -> None:
    """Collections of garbage, for which libraries ask all the time, need not look at all that earlier modules left."""
    if gc.isenabled():
        gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Nor need pytest and the interpreter, before they end, look at all that is left: seconds."""
    gc.freeze()


# Processes

PROCESS_FIXTURES = {"ray_cluster", "vllm_pool"}
"""Fixtures that start processes: a test of theirs, or of fixtures built on them, needs no marker."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if PROCESS_FIXTURES & {*getattr(item, "fixturenames", ())}:
        item.add_marker("processes")
    for marker, names in marked.MARKED.items():
        if item.nodeid.startswith(names):
            item.add_marker(marker)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray itself goes first: later on, this process uses the cluster that tests share."""
    items.sort(key=lambda item: item.get_closest_marker("own_ray") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    with process_guard.guarded(None if item.get_closest_marker("processes") else item.nodeid):
        return (yield)


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray cluster that runs and clusters in this process join.

    Its CPUs are devices to hand out, more than there are cores: the pool's, and for a cluster and a run beside it.
    """
    from fuse.driver.early_start import IMPORTED
    from fuse.workers.ray_session import local_cluster

    imported = [*IMPORTED, "fuse.intrastage.megatron_stage"]
    needs_vllm = any(item.get_closest_marker("vllm_workers") for item in request.session.items)
    if needs_vllm and importlib.util.find_spec("vllm"):
        imported.append("fuse.engines.vllm_core")
    with local_cluster(8, imported):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as an exception it would fail one test and not end the suite
        yield


@pytest.fixture(scope="session")
def worker_pool(ray_cluster: None) -> Iterator[WorkerPool]:
    """Processes of four devices, which outlast the runs that are given them; started when first needed."""
    from .worker_pool import WorkerPool

    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture
def pooled_workers(worker_pool: WorkerPool) -> Iterator[None]:
    """Runs have their workers in the pool's processes."""
    with worker_pool.in_use():
        yield


@pytest.fixture
def in_process_workers(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of one device run inside this process."""
    from . import in_process

    in_process.use(monkeypatch)


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """A real model; tests of it are skipped where it cannot be made.

    That takes ten seconds and more: it is kept in build/ until what makes it changes.
    """
    from fuse.benchmarks import smollm2

    makers = Path(smollm2.__file__).read_bytes() + version("transformers").encode()
    kept = Path(__file__).parents[1] / "build" / f"smollm2-{hashlib.sha256(makers).hexdigest()[:16]}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(kept))
        try:
            directory = smollm2.model_directory()
        except ValueError as error:
            pytest.skip(str(error))
    link = Path(_CACHE.name) / "fuse" / directory.name  # for programs that tests run
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(directory)
    return directory

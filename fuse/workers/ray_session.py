"""Ray for the length of one run: a private local cluster that leaves nothing behind, or an existing one joined."""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray._private import worker

from fuse.termination import raised_on_sigterm
from fuse.workers import reaper
from fuse.workers.fork_server import fork_server
from fuse.workers.ray_options import NodeEnded, environment, forking, lean, loopback, patient
from fuse.workers.ray_watch import watched
from fuse.workers.reaper import ESSENTIAL, MARK, end_processes_of

_LOOPBACK = "127.0.0.1"
# An AF_UNIX path holds 107 bytes, of which Ray's "/ray/session_<date>_<pid>/sockets/plasma_store" needs up to 70.
_LONGEST_TEMPORARY_DIRECTORY = 36
RAY_FILES = "ray"
"""Where in a local cluster's directory Ray's own files are."""
_START_ATTEMPTS = 2
_STOP_TIMEOUT_S = 10.0


# A process has one compute thread, and must know before it imports torch. It keeps the memory that it frees, which the
# next forward pass takes again: pages that have gone back to the system come again one by one, in virtual machines
# slowly. 32 MiB is the largest block that glibc lets come from that memory.
WORKER_ENVIRONMENT = MappingProxyType(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    }
)
"""Of every process that computes; those of a local cluster have it from their birth."""

_local_directory: Path | None = None


def local_directory() -> Path | None:
    """Where the local cluster that this process started keeps its files; None where it started none."""
    return _local_directory


@contextmanager
def local_cluster(num_cpus: int, imported: Sequence[str] = ()) -> Iterator[Path]:
    """Start a cluster of `num_cpus` CPUs (and the GPUs Ray finds) that only this machine and user can reach.

    imported: modules that its workers' processes are born with; see `fuse.workers.fork_server`.

    Loopback only, no dashboard, no usage statistics, a token of its own, its files in a new directory. Any
    number may run beside each other. On leaving, every process has ended and the directory, which is what is yielded,
    is gone. A process of its own sees to that when this one is killed.
    """
    global _local_directory
    with ExitStack() as stack:
        directory = stack.enter_context(_temporary_directory())
        stack.enter_context(_reaper(directory))
        stack.enter_context(_token())
        stack.enter_context(_quiet())
        stack.callback(_stop, directory)
        # SPT_NOENV: processes that set their title leave the memory of their environment, and so the mark, as it is.
        marked = {MARK: str(directory), "SPT_NOENV": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        with loopback(), lean(), patient(), environment({**WORKER_ENVIRONMENT, **marked}):
            server = stack.enter_context(fork_server(directory, imported)) if imported else None
            with nullcontext() if server is None else forking(server.address):
                _start(num_cpus, directory, spared=frozenset() if server is None else {server.process_id})
        _local_directory = directory
        stack.enter_context(raised_on_sigterm())
        stack.enter_context(watched(_own_processes()))
        try:
            if (address := ray.util.get_node_ip_address()) != _LOOPBACK:
                raise RuntimeError(
                    f"the local Ray cluster listens on {address}, and so on the network, not on {_LOOPBACK}"
                )
            yield directory
        finally:
            _local_directory = None


@contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at `address` ("auto" or "host:port"); leaving disconnects and stops nothing.

    Raises:
        ValueError: nothing answers at the address, it is a Ray client's, or the cluster refuses the connection.
    """
    if "://" in address:
        raise ValueError(
            f"ray_address={address!r} is a Ray client address, over which weights cannot be shared: "
            "start the run on a node of the cluster and pass the host:port that `ray start --head` printed"
        )
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if address != "auto":
            host = _require_listener(address)
            if host == "localhost" or host.startswith("127."):
                stack.enter_context(loopback())
        stack.callback(ray.shutdown)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"ray_address={address!r} cannot be joined ({reason}): check that this machine runs `ray start "
                "--address=...` of that cluster and has the same Ray version and, where it asks for one, its token"
            ) from error
        yield


def _require_listener(address: str) -> str:
    """The host of `address`, at whose port something listens: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"ray_address={address!r} is not an address: pass host:port or 'auto'")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"ray_address={address!r}: no Ray cluster answers there ({error}); start one with `ray start --head`, "
            "or leave ray_address out to run on this machine alone"
        ) from error
    return host


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    """A directory short enough for Ray's sockets."""
    parent = tempfile.gettempdir()
    if len(parent) + len("/fuse-12345678") > _LONGEST_TEMPORARY_DIRECTORY:
        parent = "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="fuse-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def _reaper(directory: Path) -> Iterator[None]:
    """A process that cleans up after this one if it is killed; it outlives a SIGKILL of the process group."""
    command = [sys.executable, "-S", "-E", reaper.__file__, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    finally:
        process.kill()
        process.stdin.close()
        process.wait()


@contextmanager
def _token() -> Iterator[None]:
    """Have Ray ask for a token that only this run knows, instead of writing one to the home directory."""
    try:
        with environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            _read_authentication()
            yield
    finally:
        _read_authentication()


def _read_authentication() -> None:
    """Have this process's part of Ray forget what it read from the environment before."""
    native: Any = ray._raylet
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing worker deaths, which reach the user as one WorkerError, and from keeping SIGTERM.

    During the run Ray's handler stays: SIGTERM becomes SystemExit, so the run is torn down in order.
    """
    listen = worker.listen_error_messages
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)

    def ignore(worker: object, threads_stopped: threading.Event) -> None:
        threads_stopped.wait()

    worker.listen_error_messages = ignore
    try:
        yield
    finally:
        worker.listen_error_messages = listen
        if in_main_thread:
            signal.signal(signal.SIGTERM, on_terminate)


def _start(num_cpus: int, directory: Path, spared: Set[int]) -> None:
    """Start Ray, once more if its node ends meanwhile, as it does where one of its agents does not answer in time.

    spared: processes that are not of the node, and live on.

    Raises:
        RuntimeError: it has ended every time.
    """
    for attempts_left in reversed(range(_START_ATTEMPTS)):
        try:
            _init(num_cpus, directory)
            return
        except NodeEnded:
            _stop(directory, spared)
            if not attempts_left:
                raise


def _init(num_cpus: int, directory: Path) -> None:
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(directory / RAY_FILES),  # which Ray opens to all users, and the one above is this one's
        _system_config={
            # One that is not ready when its actor comes would be started twice.
            "enable_worker_prestart": False,
            "prestart_worker_first_driver": False,
            # They are the run, not a background job that every other process may push aside.
            "worker_niceness": 0,
            # Nobody asks for them: a tenth of what Ray's own processes take.
            "task_events_report_interval_ms": 0,
            "enable_metrics_collection": False,
            # How a process ended, and which one, is worth more than a second: its last words are found by it.
            "timeout_ms_task_wait_for_death_info": 30_000,
        },
    )


def _own_processes() -> dict[str, subprocess.Popen[bytes]]:
    """Of the local cluster, without which it does not go on."""
    untyped: Any = worker
    started = untyped._global_node.all_processes
    return {name: started[name][0].process for name in ESSENTIAL}


def _stop(directory: Path, spared: Set[int] = frozenset()) -> None:
    """Stop the local cluster whose files are in `directory`, and return when its last process has ended."""
    ray.shutdown()
    end_processes_of(directory, _STOP_TIMEOUT_S, spared)

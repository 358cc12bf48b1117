"""What carries the KV of migrating samples in a run."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Literal

import torch

from fuse.workers.kv.transfer import KVTransfer, MakeKVTransfer, ObjectStoreTransfer

KVCarrier = Literal["object_store", "nixl"]

_NIXL_VERSION = "1.5.1"


def choose_kv_transfer(kind: KVCarrier, accelerator: Literal["cpu", "cuda"], *, is_local: bool) -> MakeKVTransfer:
    """The carrier of that kind. is_local: all processes are on one host.

    Raises: ValueError when its package is not installed.
    """
    if kind == "nixl":
        require_nixl()
        return partial(_nixl_transfer, torch.device(accelerator), is_local)
    return ObjectStoreTransfer


def require_nixl() -> None:
    """Raises: ValueError when NIXL is not installed, or another version of it, or not for torch's CUDA."""
    cuda_major = None if torch.version.cuda is None else torch.version.cuda.split(".")[0]
    backend = f"nixl-cu{cuda_major or 12}"
    for package in ("nixl", backend):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != _NIXL_VERSION:
            state = "is not installed" if installed is None else f"is installed as {installed}"
            raise ValueError(
                f"kv_transfer='nixl' needs {package} {_NIXL_VERSION}, which {state}: pip install --no-deps "
                f"nixl=={_NIXL_VERSION} {backend}=={_NIXL_VERSION}; or choose kv_transfer='object_store'"
            )


def _nixl_transfer(device: torch.device, is_local: bool) -> KVTransfer:
    from fuse.workers.kv.nixl import NixlTransfer  # loads NIXL, which only those that use it need

    return NixlTransfer(device, is_local=is_local)

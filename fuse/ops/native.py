"""The native extension, or the reason why there is none."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

logger = logging.getLogger("fuse.ops")


@cache
def extension() -> tuple[ModuleType | None, str]:
    """`fuse._native`, or None where it was not built, and the reason in words."""
    try:
        return import_module("fuse._native"), "fuse._native is built"
    except ImportError as error:
        return None, f"fuse._native does not load ({error}); build it with `make setup` or `pip install`"


def choose(
    device: torch.device, dtype: torch.dtype | None = None, dtypes: Collection[torch.dtype] = ()
) -> tuple[ModuleType | None, str]:
    """The extension if it serves CPU inputs of `dtype`, one of `dtypes`, and in words what serves; no dtype is any."""
    native, reason = extension()
    if native is None:
        return None, f"torch reference: {reason}"
    if device.type != "cpu" or (dtype is not None and dtype not in dtypes):
        what = "" if dtype is None else f" for {dtype}"
        return None, f"torch reference: there is no native code{what} on {device.type}"
    return native, "native C++"


@cache
def log_choice(operation: str, implementation: str) -> None:
    """Log an operation's implementation the first time that it serves."""
    logger.info("%s: %s", operation, implementation)

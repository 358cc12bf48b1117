"""The native extension, or the reason why there is none."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

logger = logging.getLogger("fuse.ops")


@cache
def extension() -> tuple[ModuleType | None, str]:
    """`fuse._native`, or None where it was not built, and the reason in words."""
    try:
        return import_module("fuse._native"), "fuse._native is built"
    except ImportError as error:
        return None, f"fuse._native does not load ({error}); build it with `make setup` or `pip install`"


@cache
def log_choice(operation: str, implementation: str) -> None:
    """Log an operation's implementation the first time that it serves."""
    logger.info("%s: %s", operation, implementation)

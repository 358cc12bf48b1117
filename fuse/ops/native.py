"""The native extension, or the reason why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger("fuse.ops")


@cache
def extension() -> tuple[ModuleType | None, str]:
    """`fuse._native`, or None where it was not built, and the reason in words."""
    try:
        return import_module("fuse._native"), "fuse._native is built"
    except ImportError as error:
        return None, f"fuse._native does not load ({error}); build it with `make setup` or `pip install`"


def described(on_cpus: str, elsewhere: str, *, on_gpus: str | None = None) -> str:
    """What serves an operation, in words: native code on CPUs and what does elsewhere, or the reference, and why.

    on_gpus: what its CUDA code serves, where it has some; that may not have been built.
    """
    native, reason = extension()
    if native is None:
        return f"torch reference: {reason}"
    if on_gpus is not None:
        on_cpus += f", {on_gpus if native.has_cuda else f'torch reference on GPUs: {NOT_BUILT}'}"
    return f"{on_cpus}; {elsewhere}"


def choose(
    device: torch.device,
    dtype: torch.dtype | None = None,
    dtypes: Collection[torch.dtype] = (),
    *,
    has_cuda: bool = False,
) -> tuple[ModuleType | None, str]:
    """The extension where it serves such inputs, else None; and in words what serves.

    dtypes: those that the operation's native code knows; without a `dtype` it serves any.
    has_cuda: the operation has CUDA code beside that for CPUs; whether it was built is another matter.
    """
    native, reason = extension()
    if native is None:
        return None, f"torch reference: {reason}"
    if dtype is None or dtype in dtypes:
        if device.type == "cpu":
            return native, "native C++"
        if device.type == "cuda" and has_cuda and native.has_cuda:
            return native, "native CUDA"
        if device.type == "cuda" and has_cuda:
            return None, f"torch reference: {NOT_BUILT}"
    what = "" if dtype is None else f" for {dtype}"
    return None, f"torch reference: there is no native code{what} on {device.type}"


NOT_BUILT = "fuse._native was built without a CUDA compiler"


def queue(device: torch.device) -> tuple[int, ...]:
    """What native code takes beside its arrays: on a GPU the stream to work on, on a CPU nothing."""
    return (torch.cuda.current_stream(device).cuda_stream,) if device.type == "cuda" else ()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that native code launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def call(function: Callable[..., None], *arguments: object) -> None:
    """Have native code write its results, but not into tensors of shapes alone, by which memory is measured."""
    if not any(isinstance(one, FakeTensor) for one in arguments):
        function(*arguments)


@cache
def log_choice(operation: str, implementation: str) -> None:
    """Log an operation's implementation the first time that it serves."""
    logger.info("%s: %s", operation, implementation)

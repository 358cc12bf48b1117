"""Peers' processes are forked from one that has imported what they need, which takes longer than what they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from fuse.benchmarks import peer_process

_IMPORTED = ["fuse.benchmarks.iteration.trl_grpo", "fuse.benchmarks.iteration.trl_ppo", "fuse.engines.transformers"]


@pytest.fixture(scope="session", autouse=True)
def _peers_are_forked() -> Iterator[None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_process, "_SPAWN", context)
        yield

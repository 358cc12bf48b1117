"""One Ray cluster for all runs of this folder: starting one takes longer than a tiny run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuse.workers.ray_session import local_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_cluster(num_cpus=2):
        yield

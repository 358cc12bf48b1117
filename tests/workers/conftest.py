from collections.abc import Iterator

import pytest

from fuse.workers.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A local cluster of two devices; each test gives its workers back with `cluster.kill`."""
    with Cluster(2) as started:
        yield started

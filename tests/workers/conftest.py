from collections.abc import Iterator

import pytest

from fuse.workers.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(ray_cluster: None) -> Iterator[Cluster]:
    """Two devices; each test gives its workers back with `cluster.kill`."""
    with Cluster(2) as started:
        yield started

"""Joining a Ray cluster of two real nodes on this machine."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster as RayNodes

from fuse.workers import ray_options
from fuse.workers.calls import gather
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.own_ray, pytest.mark.processes]

PATIENCE_S = 300.0


class Where:
    def where(self) -> tuple[str, frozenset[int]]:
        return ray.get_runtime_context().get_node_id(), frozenset(os.sched_getaffinity(0))

    def hang(self) -> None:
        time.sleep(1000)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    # pytest's own directories are too long for sockets
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory, pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", directory)  # where Ray notes the address of the last cluster started
        Path(directory, "ray").mkdir()
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": directory}
        with ray_options.lean(), ray_options.patient():
            nodes = RayNodes(initialize_head=True, head_node_args=head)
            nodes.add_node(num_cpus=1)
        yield nodes
        nodes.shutdown()


def test_devices_spread_over_the_nodes_and_the_cluster_outlives_the_run(nodes: RayNodes) -> None:
    for _ in range(2):  # the second run finds the devices free again
        with Cluster(2, ray_address=nodes.address) as cluster:
            workers = [cluster.spawn(role, device, Where) for device in (0, 1) for role in ("generation", "model")]
            found = gather([worker.call(Where.where) for worker in workers])
            processes = [psutil.Process(worker.process_id) for worker in workers]
        assert [node for node, _ in found] == [found[0][0]] * 2 + [found[2][0]] * 2
        assert len({node for node, _ in found}) == 2
        # Two nodes, one machine: their first devices must not share its first core.
        assert found[0][1] == found[1][1] != found[2][1] == found[3][1]
        assert not psutil.wait_procs(processes, timeout=PATIENCE_S)[1]
        assert not ray.is_initialized()


def test_too_few_devices_are_reported_with_what_there_is(nodes: RayNodes) -> None:
    with pytest.raises(ValueError, match=r"num_devices=3, but the Ray cluster of 2 nodes has 2 .*num_devices=2 or"):
        Cluster(3, ray_address=nodes.address).__enter__()
    with pytest.raises(ValueError, match=r"num_devices=1, but the Ray cluster of 2 nodes has 0 .*one GPU"):
        Cluster(1, ray_address=nodes.address, accelerator="cuda").__enter__()
    assert not ray.is_initialized()


def test_a_connection_of_the_user_is_used_and_left_open(nodes: RayNodes) -> None:
    ray.init(nodes.address, log_to_driver=False)
    try:
        with Cluster(1) as cluster:
            cluster.spawn("model", 0, Where).call(Where.where).result()
        with pytest.raises(ValueError, match="already uses the Ray cluster at"):
            Cluster(1, ray_address="10.0.0.1:6379").__enter__()
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_lost_node_is_named_as_the_cause(nodes: RayNodes) -> None:
    with ray_options.lean(), ray_options.patient():
        extra = nodes.add_node(num_cpus=1)
    with Cluster(3, ray_address=nodes.address) as cluster:
        workers = [cluster.spawn("model worker", device, Where) for device in range(3)]
        lost = [node for node, _ in gather([worker.call(Where.where) for worker in workers])].index(extra.node_id)
        calls = [worker.call(Where.hang) for worker in workers]
        for raylet in extra.all_processes[PROCESS_TYPE_RAYLET]:
            raylet.process.terminate()
            raylet.process.wait(PATIENCE_S)  # `remove_node` does for a second, and then the node's end is not told
        nodes.remove_node(extra)
        with pytest.raises(WorkerError, match=rf"^model worker on device {lost} failed: the node it ran on died"):
            gather(calls)

"""What a worker's process has freed is not kept over the phases that do without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuse.workers import host_memory, model_worker
from fuse.workers.ray_session import WORKER_ENVIRONMENT

from ..trainers import tiny

PROGRAM = """
from fuse.workers.host_memory import give_back

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

held = [bytes(b"x" * (1 << 20)) for _ in range(200)]
between = [held.pop(index) for index in (150, 100, 50)]
most = resident_mb()
held.clear()
kept = resident_mb()
give_back()
print(most, kept, resident_mb())
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_between_that_in_use_goes_back_too() -> None:
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    most, kept, left = map(int, ran.stdout.split())
    assert kept > most - 20, "the allocator keeps what is freed"
    assert left < most - 180


@pytest.mark.usefixtures("in_process_workers")
def test_every_update_gives_back_before_and_after_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(model_worker, "give_back_if_scarce", lambda: given.append(1))
    tiny.train(tmp_path, total_episodes=16)
    assert len(given) == 2 * 2, "before it trains and after it, in both updates"


@pytest.mark.parametrize(("available_mb", "is_given"), [(16 * 3 * 100 + 1, False), (16 * 3 * 100 - 1, True)])
def test_memory_that_is_plentiful_is_kept(available_mb: int, is_given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 100 MB on a host of three cores."""
    given: list[int] = []
    monkeypatch.setattr(host_memory, "give_back", lambda: given.append(1))
    monkeypatch.setattr(host_memory, "used_bytes", lambda: 100 << 20)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: available_mb << 20)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    host_memory.give_back_if_scarce()
    assert bool(given) == is_given


def test_a_container_counts_its_own_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    assert host_memory.available_bytes(meminfo, tmp_path) == 8000 << 10
    (tmp_path / "memory.current").write_text("1024\n")
    for limit, expected in (("max", 8000 << 10), ("4096", 3072)):
        (tmp_path / "memory.max").write_text(limit)
        assert host_memory.available_bytes(meminfo, tmp_path) == expected
    assert host_memory.available_bytes(tmp_path / "none", tmp_path) is None

"""What a worker's process has freed is not kept over the phases that do without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuse.workers import model_worker
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
def test_every_update_ends_by_giving_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(model_worker, "give_back", lambda: given.append(1))
    tiny.train(tmp_path, total_episodes=16)
    assert len(given) == 2

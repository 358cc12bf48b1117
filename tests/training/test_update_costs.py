"""What follows a step's last micro-batch is measured on all devices at once."""

from __future__ import annotations

import itertools

import pytest
import torch

from fuse.training import update_costs
from fuse.training.update_costs import measure_update_costs

from ..distributed.fake_nccl import FakeNccl


def test_ranks_measure_sums_and_steps_together() -> None:
    for costs in FakeNccl(3, 0).run(lambda _: measure_update_costs(3, torch.device("cpu"))):
        assert min(costs.step_s, costs.exchange_s) > 0


def test_on_cpus_a_process_counts_its_own_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are generated on the same cores meanwhile; operations are measured by that clock, too."""
    ticks = itertools.count()
    monkeypatch.setattr(update_costs.time, "process_time", lambda: float(next(ticks)))
    costs = FakeNccl(1, 0).run(lambda _: measure_update_costs(2, torch.device("cpu")))
    assert [(one.step_s, one.exchange_s) for one in costs] == [(2.0**-20, 2.0**-20)]

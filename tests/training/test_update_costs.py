"""What follows a step's last micro-batch is measured on all devices at once."""

from __future__ import annotations

import torch

from fuse.training.update_costs import measure_update_costs

from ..distributed.fake_nccl import FakeNccl


def test_ranks_measure_sums_and_steps_together() -> None:
    for costs in FakeNccl(3, 0).run(lambda _: measure_update_costs(3, torch.device("cpu"))):
        assert min(costs.step_s, costs.exchange_s) > 0

"""A run by hand: an update at a time, what each was, and responses of given lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..worker_pool import WorkerPool
from . import tiny


@pytest.fixture(autouse=True)
def pooled_workers(worker_pool: WorkerPool) -> Iterator[None]:
    with worker_pool.in_use():
        yield


def test_each_update_is_told_of_when_it_is_over(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, inter_stage_fusion=False, trace_limit=1)
    assert trainer.process_ids == {}
    with trainer.updates() as updates:
        assert trainer.state.global_step == 0
        assert {kind: len(ids) for kind, ids in trainer.process_ids.items()} == {"generation": 1, "model": 1}
        first = next(updates)
        assert (first.update, trainer.state.global_step) == (1, 1)
        second = next(updates)
        assert list(updates) == []
    assert second.update == 2
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["iteration-00002.json"], "trace_limit"
    assert [one.metrics for one in (first, second)] == trainer.state.log_history
    for one in (first, second):
        assert len(one.samples) == 8
        assert all(sample.score is not None for sample in one.samples)
        assert one.phases.keys() == {"generation", "inference", "reward", "training", "weights"}
        categories = {span.category for workers in one.tracks.values() for spans in workers.values() for span in spans}
        assert {"generate", "infer", "train", "optimizer"} <= categories
    assert tiny.difference(trainer.policy_model, trainer.ref_model) > 1e-3, "the weights were not fetched"


def test_workers_stop_when_it_is_left_early(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    with trainer.updates() as updates:
        next(updates)
    assert trainer.process_ids == {}
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_lengths_can_be_forced(fused: bool, tmp_path: Path) -> None:
    lengths = [3, 8, 1, 5, 2, 8, 4, 7]
    trainer = tiny.trainer(tmp_path, stop_token=None, inter_stage_fusion=fused, missing_eos_penalty=None)
    trainer.max_new_tokens = dict(enumerate(lengths))
    with trainer.updates() as updates:
        assert [len(sample.response_ids) for sample in next(updates).samples] == lengths
        assert {len(sample.response_ids) for sample in next(updates).samples} == {8}, "these are not limited"

"""A drawn rollout has every sample, every move and every inference where the simulator has it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fuse.interstage import drawing
from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES
from fuse.interstage.lengths import KnownLengths
from fuse.interstage.migration import EngineLimits, StageByStage
from fuse.interstage.rollout import Rollout, SimulationResult, SpanKind
from fuse.interstage.simulate import simulate
from schedules.export.svg import document


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Every eighth response is long."""
    return Rollout(
        prompt_tokens=np.full(48, 1024),
        response_tokens=np.array(([400] + [20 + i for i in range(7)]) * 6),
        num_devices=6,
        costs=PROFILES["llama-33b-8xh800"],
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=10**7, max_new_tokens=400),
    )


@pytest.fixture(scope="module")
def fused(rollout: Rollout) -> SimulationResult:
    return simulate(rollout, Adaptive(rollout.costs, KnownLengths(rollout.response_tokens), True))


def test_bars_are_the_samples_time_in_batches(rollout: Rollout, fused: SimulationResult) -> None:
    chart = drawing.rollout_chart(fused)
    assert {bar.span.sample for bar in chart.bars} == set(range(48))
    assert len(chart.bars) == 48 + fused.num_migrations
    assert fused.num_migrations > 0
    ends = [bar.span.end_s for bar in chart.bars]
    assert max(ends) == pytest.approx(fused.generation_s)
    for device, spans in enumerate(fused.timeline):
        of_device = [bar.span for bar in chart.bars if bar.span.device == device]
        generating = [span for span in spans if span.kind is SpanKind.GENERATE]
        for span in of_device:
            assert any(one.start_s <= span.start_s <= span.end_s <= one.end_s for one in generating)


def test_samples_of_a_device_do_not_overlap(fused: SimulationResult) -> None:
    bars = sorted(drawing.rollout_chart(fused).bars, key=lambda bar: (bar.top, bar.span.start_s))
    for before, after in pairwise(bars):
        assert before.top < after.top or before.span.end_s <= after.span.start_s
    assert all(bar.span.device < bar.top < bar.bottom < bar.span.device + 1 for bar in bars)


def test_moves_go_from_where_a_sample_left_to_where_it_went_on(fused: SimulationResult) -> None:
    moves = drawing.rollout_chart(fused).moves
    assert len(moves) == fused.num_migrations
    for source, target in moves:
        assert source.span.sample == target.span.sample
        assert source.span.device != target.span.device
        assert source.span.end_s < target.span.start_s
        assert source.is_migrated
        assert target.is_migrated


def test_without_migration_each_sample_is_one_bar(rollout: Rollout) -> None:
    chart = drawing.rollout_chart(simulate(rollout, StageByStage()))
    assert (len(chart.bars), chart.moves) == (48, ())
    assert len(chart.inference) == 6
    assert min(block.start_s for block in chart.inference) == pytest.approx(max(bar.span.end_s for bar in chart.bars))


def test_picture_and_page_show_it(rollout: Rollout, fused: SimulationResult) -> None:
    text = document(drawing.picture({"Stage by stage": simulate(rollout, StageByStage()), "Fused": fused}))
    for words in ("Stage by stage: ", "Fused: ", "device 5", "sample that is migrated", "inference"):
        assert words in text
    page: Any = drawing.page(fused, title="Fused")
    assert [len(trace.x) for trace in page.data] == [
        48 + fused.num_migrations - sum(bar.is_migrated for bar in drawing.rollout_chart(fused).bars),
        sum(bar.is_migrated for bar in drawing.rollout_chart(fused).bars),
        len(drawing.rollout_chart(fused).inference),
    ]
    assert len(page.layout.annotations) == fused.num_migrations

"""Traces: lanes without overlap, arrows that follow samples, counters, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fuse.trace import Span
from fuse.trace_file import DRIVER, FIRST_LANE, lanes_of, tracks_of, write_chrome_trace


def stay(sample: int, start_s: float, end_s: float) -> Span:
    return Span(f"sample {sample}", "sample", start_s, end_s, {"sample": sample})


def test_what_is_written_is_read_and_drawn(tmp_path: Path) -> None:
    """Sample 7 moves from one engine to the other, is scored there and rewarded; sample 8 stays."""
    decode = [Span("decode", "generate", 1, 2, {"batch": 2, "context_tokens": 9}), Span("decode", "generate", 2, 3)]
    scored = Span("reference", "infer", 6, 8, {"sample_ids": [7]})
    tracks = {
        "device0": {"generation": [*decode, stay(7, 1, 3), stay(8, 1, 4), Span("memory", "usage", 9, 9, {"bytes": 5})]},
        "device1": {"generation": [stay(7, 4, 5)], "model": [scored]},
        DRIVER: {"rewards": [Span("mine", "reward", 6, 7, {"sample_ids": [7, 8]})]},
    }
    path = tmp_path / "traces" / "one.json"
    write_chrome_trace(path, tracks, {"policy": "none"})
    trace = json.loads(path.read_text())
    assert trace["otherData"] == {"policy": "none"}
    events = trace["traceEvents"]
    on_first = [event for event in events if event["ph"] == "X" and event["pid"] == 0 and event["cat"] == "sample"]
    assert [event["tid"] for event in on_first] == [FIRST_LANE, FIRST_LANE + 1]
    arrows = [(event["ph"], event["id"], event["pid"], event["ts"]) for event in events if event["ph"] in "stf"]
    of_seven = [arrow for arrow in arrows if arrow[1] == arrows[0][1]]
    assert [(kind, process, ts) for kind, _, process, ts in of_seven] == [
        ("s", 0, 1e6),  # the middle of each, after the first event
        ("t", 1, 3.5e6),
        ("t", 2, 5.5e6),
        ("f", 1, 6e6),
    ]
    assert len(arrows) == 4 + 2
    counters = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    assert counters == {
        "live samples": {"batch": 2},
        "KV tokens": {"context_tokens": 9},
        "bytes of generation": {"bytes": 5},
    }
    told = tracks_of(trace)
    assert told["device1"]["model"] == [Span("reference", "infer", 5.0, 7.0, {"sample_ids": [7]})]
    assert {span.name for span in told["device0"]["generation"]} == {"decode", "sample 7", "sample 8"}
    assert told[DRIVER]["rewards"][0].arguments == {"sample_ids": [7, 8]}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_stays_of_a_lane_never_overlap_and_no_lane_is_wasted(drawn: list[tuple[int, int]]) -> None:
    stays = [(float(start), float(start + length)) for start, length in drawn]
    lanes = lanes_of(stays)
    most = max((sum(a <= moment < b for a, b in stays) for moment, _ in stays), default=0)
    assert len(set(lanes)) == most
    for one in range(len(stays)):
        for other in range(one):
            if lanes[one] == lanes[other]:
                assert stays[one][1] <= stays[other][0] or stays[other][1] <= stays[one][0]

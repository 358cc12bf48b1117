"""What a page is told of a run, and what it says in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fuse.interstage.recorded import recorded_rollout, simulated
from fuse.run_page.data import details, read_details, read_run, run_data, trace_record
from fuse.run_page.page import page
from fuse.run_page.words import advice, alarms
from fuse.update_log import UpdateRecord


def record(update: int = 2, **metrics: float) -> UpdateRecord:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return UpdateRecord(
        update=update,
        start_s=10.0 * update,
        end_s=10.0 * update + 9,
        metrics=named,
        phases=[],
        strips={"device0": "c" * 64},
    )


def test_a_rollout_is_read_as_it_was_and_simulated_with_the_same_samples(run_directory: Path) -> None:
    _, traces = read_run(run_directory)
    assert sorted(traces) == [7, 8]
    trace = json.loads(traces[8].read_text())
    recorded = recorded_rollout(trace)
    assert recorded is not None
    assert sorted(recorded.tokens) == list(range(16))
    assert recorded.devices == ("device0", "device1")
    assert recorded.result.num_migrations == sum(1 for _ in recorded.result.samples) - 16 > 0
    again = simulated(recorded)
    assert again is not None
    assert {span.sample for span in again.samples} == set(range(16))
    assert again.makespan_s == pytest.approx(recorded.result.makespan_s, rel=0.5), "by the costs of its own steps"


def test_details_have_every_step_and_every_sample_once_per_stay(run_directory: Path) -> None:
    _, traces = read_run(run_directory)
    found = read_details(traces[8])
    assert found["notes"] == []
    bars = found["rollout"]["bars"]
    assert len({bar[4] for bar in bars}) == 16
    assert {bar[4] for bar in bars if bar[7]} == {bar[4] for bar in bars if [b[4] for b in bars].count(bar[4]) > 1}
    assert [step["ranks"] for step in found["steps"]] == [2, 2]
    for step in found["steps"]:
        assert step["planned"][0] < step["executed"][0]
        assert len(step["ops"]) == 2 * 2 * 2 * 4  # forward and backward of two models' two stages, four micro-batches


def test_figures_of_all_updates(run_directory: Path) -> None:
    records, traces = read_run(run_directory)
    run = run_data(records, "mine", traces)
    assert run["updates"] == list(range(1, 9))
    assert run["devices"] == ["device0", "device1"]
    assert all(len(values) == 8 for values in run["metrics"].values())
    assert {len(strip) for strips in run["strips"] for strip in strips} == {run["cells"]}
    assert run["detailed"] == [7, 8]
    unit, meaning, healthy = run["words"]["val/sampler_logprob_diff"]
    assert unit == "nats"
    assert "sampler" in meaning
    assert healthy


def test_one_trace_makes_a_page_of_one_update(run_directory: Path) -> None:
    _, traces = read_run(run_directory)
    trace = json.loads(traces[7].read_text())
    one = trace_record(trace)
    assert one.update == 7
    assert {name for name, _, _ in one.phases} == {"rollout", "training", "weights"}
    assert one.strips.keys() == {"device0", "device1"}
    assert sum(value for name, value in one.metrics.items() if name.startswith("idle_cause/")) > 0


def test_what_cannot_be_drawn_is_said() -> None:
    def event(name: str, category: str, start: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": category, "pid": 0, "tid": 0, "ts": start, "dur": 1.0, "args": {}}

    notes = details({"traceEvents": [event("profile", "train", 0.0)]})["notes"]
    assert [note.split(":")[0] for note in notes] == ["This trace holds no samples", "Its training cannot be drawn"]
    with pytest.raises(ValueError, match="holds no span of a device"):
        trace_record({"traceEvents": []})
    with pytest.raises(ValueError, match=r"has no updates\.jsonl: give the output directory of a run"):
        read_run(Path("/"))


def test_no_text_ends_the_element_that_it_is_in() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    named = replace(record(), metrics={hostile: 1.0}, strips={hostile: "G" * 64})
    document = page(run_data([named], hostile, []), {})
    assert "alert(1)</script>" not in document
    assert document.count("</script>") == 2, "the data and the page's own"


def test_advice_is_on_what_idles_most_and_names_the_device() -> None:
    first = record(1, idle_cause__tail=0.9)
    lines = advice([first, record(2, idle_cause__tail=0.2, idle_cause__reward=0.1, idle_cause__host=0.01)])
    assert len(lines) == 2, "the first update, and what takes little, are not spoken of"
    assert lines[0].startswith("20% of all devices' time (100% of device0) is idle for the tail of generation: ")
    assert "none of them moves: inter_stage_fusion with migration_policy='adaptive'" in lines[0]
    assert lines[1].startswith("10% of all devices' time is idle for rewards: ")
    moved = record(
        2, idle_cause__tail=0.2, migration__samples=3, completions__max_length=99, completions__mean_length=9
    )
    assert "though samples move: the longest has 99 tokens, on average 9" in advice([moved])[0]
    assert "no single cause takes 5%" in advice([record(2, idle_cause__tail=0.01)])[0]
    assert "Training idles 30% where 10% was planned" in advice([record(bubble__planned=0.1, bubble__executed=0.3)])[0]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"val__sampler_logprob_diff": 0.5}, "the sampler's log-probabilities are 0.5 from the trainer's"),
        ({"completions__clipped_ratio": 0.75}, "75% of the responses are cut off"),
        ({"reward_std": 0.0}, "all responses score the same"),
        ({"frac_reward_zero_std": 0.95}, "in 95% of the groups all rewards are equal"),
        ({"rewards__errors": 3.0}, "3 samples have the score of errors"),
        ({"policy__clipfrac_avg": 0.6}, "60% of the ratios are clipped"),
        ({"loss": float("nan")}, "loss is nan, not a number"),
        ({"grad_norm": 99.0}, "grad_norm is 99, where 1 was usual"),
        ({"entropy": 0.001}, "entropy fell from 2 to 0.001"),
        ({"critic__explained_variance": -0.5}, "the critic is worse than a constant"),
    ],
)
def test_alarms(metrics: dict[str, float], said: str) -> None:
    usual = {"grad_norm": 1.0, "entropy": 2.0, "critic__explained_variance": -0.1, "reward_std": 0.5}
    before = [record(update, **usual) for update in range(1, 7)]
    (line,) = (text for text in alarms([*before, record(7, **metrics)]) if "critic" in said or "critic" not in text)
    assert line.startswith(f"Update 7: {said}")
    assert alarms([record(1, reward_std=0.5, completions__clipped_ratio=0.1)]) == []

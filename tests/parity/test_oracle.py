"""The oracle's runs are what the parity tests take them for: each case shows the effect it is named after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .cases import BASELINE, CASES, EOS, PAD, Case, build_models
from .oracle import Recording, record

Recorded = Callable[[Case], Recording]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def lengths(recording: Recording) -> list[int]:
    return [len(response.token_ids) for response in recording.responses]


def test_a_recording_holds_every_sample_and_permutation(recorded: Recorded) -> None:
    recording = recorded(BASELINE)
    assert [query.shape[0] for query in recording.queries] == [8, 8, 8]
    assert len(recording.responses) == 24
    assert len(recording.permutations) == 3 * 2
    assert all(logprob < 0 for response in recording.responses for logprob in response.logprobs)


def test_a_run_is_repeatable(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = recorded(BASELINE), record(BASELINE, tmp_path_factory.mktemp("again"))
    assert first.responses == second.responses
    assert all(torch.equal(weight, second.policy[name]) for name, weight in first.policy.items())


def test_without_a_stop_token_eos_is_a_token_like_others(recorded: Recorded) -> None:
    recording = recorded(BASELINE)
    assert set(lengths(recording)) == {10}
    assert any(EOS in response.token_ids[:-1] for response in recording.responses)


def test_early_stops_are_of_many_lengths(recorded: Recorded) -> None:
    recording = recorded(case_named("early_stops"))
    assert len(set(lengths(recording))) > 5
    assert 10 in lengths(recording)


def test_clipping_takes_place(recorded: Recorded) -> None:
    metrics = recorded(case_named("early_stops")).metrics
    assert all(update["policy/clipfrac_avg"] > 0.05 and update["val/clipfrac_avg"] > 0.05 for update in metrics)


def test_responses_run_past_their_stop_token(recorded: Recorded) -> None:
    recording = recorded(case_named("past_stop"))
    assert set(lengths(recording)) == {10}
    assert sum(EOS in response.token_ids[:-1] for response in recording.responses) > 8


def test_padding_is_sampled_inside_responses(recorded: Recorded) -> None:
    recording = recorded(case_named("pad_is_sampled"))
    assert sum(PAD in response.token_ids[:-1] for response in recording.responses) > 8


def test_a_response_can_be_empty(recorded: Recorded) -> None:
    recording = recorded(case_named("pad_is_eos"))
    assert any(response.token_ids == (EOS,) for response in recording.responses)


def test_the_end_of_a_pass_makes_more_steps(recorded: Recorded) -> None:
    def distance(case: Case) -> float:
        recording, initial = recorded(case), build_models(case).policy.state_dict()
        return max((recording.policy[name] - weight).abs().max().item() for name, weight in initial.items())

    assert distance(case_named("end_of_pass")) > 1.1 * distance(case_named("early_stops"))

"""`fuse solve`: what it prints and writes, and the one line it answers bad input with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuse.cli import main
from schedules import Problem, check, evaluate
from schedules.formats import problem_to_json, schedule_from_json
from schedules.instances import actor_and_critic

SHAPE = ["--actor-stages", "2", "--critic-stages", "2", "--actor-microbatches", "3", "--time-limit", "120"]


def test_solves_what_options_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solution.json"
    assert main(["solve", *SHAPE, "--actor-activation", "1.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A actor, B critic" in printed
    assert "optimal: found by" in printed
    solution = json.loads(out.read_text())
    schedule = schedule_from_json(solution["schedule"])
    check(schedule)
    assert evaluate(schedule).makespan == solution["makespan"] == solution["makespan_lower_bound"]
    assert solution["history"][-1]["makespan"] == solution["makespan"]


def test_solves_a_problem_file_under_a_limit(tmp_path: Path) -> None:
    problem = actor_and_critic(
        actor_stages=2,
        critic_stages=1,
        actor_microbatches=2,
        critic_microbatches=2,
        actor_forward=1,
        critic_forward=1,
        actor_activation=2,
        critic_activation=1,
    ).problem
    source, out = tmp_path / "problem.json", tmp_path / "solution.json"
    source.write_text(json.dumps(problem_to_json(problem)))
    assert main(["solve", str(source), "--memory-limit", "3", "--time-limit", "120", "--out", str(out)]) == 0
    schedule = schedule_from_json(json.loads(out.read_text())["schedule"])
    check(schedule)
    assert schedule.problem == Problem(num_ranks=2, pipelines=problem.pipelines, memory_limit_bytes=(3, 3))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--actor-stages is missing: give it, or a PROBLEM.json"),
        (["--actor-stages", "2"], "--actor-microbatches is missing"),
        ([*SHAPE, "--critic-stages", "3"], "critic_stages 3 must divide actor_stages 2"),
        ([*SHAPE, "--memory-limit", "0.5"], "rank 0: limit of 0 bytes is too small for one micro-batch; it needs 1"),
        ([*SHAPE, "--time-limit", "0"], "time_limit_s 0.0 must be positive"),
        (["absent.json"], "No such file or directory"),
        (["absent.json", "--actor-stages", "2"], "give one of them"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["solve", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "problem.json"
    for content, line in [("{", "is not JSON"), ("[]", "expected an object, not list"), ("{}", "version is None")]:
        source.write_text(content)
        assert main(["solve", str(source)]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1

"""`fuse bench solver` writes one complete row per problem and seed, and refuses what it cannot solve."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fuse.benchmarks.solver import command
from schedules import check, evaluate
from schedules.baselines import serial
from schedules.formats import schedule_from_text
from schedules.fused.solve import solve
from schedules.instances import heterogeneous

TINY = {
    "name": "tiny",
    "actor_stages": 2,
    "critic_stages": 1,
    "actor_microbatches": 2,
    "critic_microbatches": 2,
    "actor_forward": 2,
    "critic_forward": 1,
    "actor_activation": 1.5,
    "critic_activation": 1,
    "published": {"makespan": 1000, "peak_memory": 1000},
    "target": {"makespan": 1, "peak_memory": 1},
}

KEYS = {
    "name", "seed", "makespan", "peak_memory", "makespan_lower_bound", "memory_lower_bound", "seconds", "published",
    "target", "seconds_to_published", "status", "found_by", "makespan_gap", "target_met", "greedy_makespan",
    "serial_makespan", "peak_process_bytes", "history",
}  # fmt: skip


def _run(tmp_path: Path, *options: str) -> int:
    (tmp_path / "instances.json").write_text(json.dumps({"instances": [TINY, {**TINY, "name": "other"}]}))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--time-limit", "2", *options]))


def test_writes_a_row_per_problem_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    instances = str(tmp_path / "instances.json")
    options = ["--instances", instances, "--only", "tiny", "--split-backward", "--seeds", "2", "--json", str(out)]
    assert _run(tmp_path, *options, "--time-limit", "120") == 0  # which proves the optimum
    results = json.loads(out.read_text())
    assert [(row["name"], row["seed"]) for row in results["rows"]] == [
        ("tiny", 0),
        ("tiny", 1),
        ("tiny split", 0),
    ]
    first = results["rows"][0]
    assert first.keys() == KEYS
    assert first["status"] == "optimal"
    assert first["makespan"] == first["makespan_lower_bound"] == first["history"][-1][1]
    assert first["peak_memory"] == first["memory_lower_bound"] == first["history"][-1][2]
    assert first["seconds_to_published"] == first["history"][0][0]
    assert first["target_met"] is False
    split = results["rows"][2]
    assert split["target_met"] is None
    assert split["makespan"] <= first["makespan"]
    assert split["peak_memory"] <= min(row["peak_memory"] for row in results["rows"][:2])  # it is limited to that
    assert results["evaluation_us"] > 0
    assert results["machine"]["num_cores"] >= 1
    assert "makespan gap: median 0.00%, worst 0.00% over 3 runs" in capsys.readouterr().out


@pytest.fixture
def no_evaluation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than to solve tiny problems."""
    monkeypatch.setattr(command, "evaluation_microseconds", lambda: 1.0)


@pytest.mark.usefixtures("no_evaluation_is_timed")
def test_keeps_the_best_schedule_and_draws_the_rows_now_or_later(tmp_path: Path) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "figures" / "quality.svg"
    instances = str(tmp_path / "instances.json")
    options = ["--instances", instances, "--json", str(out), "--schedules", str(tmp_path / "best")]
    assert _run(tmp_path, *options, "--figure", str(figure)) == 0
    for row in json.loads(out.read_text())["rows"]:
        timing = evaluate(schedule_from_text((tmp_path / "best" / f"{row['name']}.schedule").read_text()))
        assert timing.makespan == row["makespan"]
    drawn = figure.read_text()
    assert all(word in drawn for word in ("<svg", "tiny", "other"))
    again = tmp_path / "again.svg"
    assert _run(tmp_path, "--from-json", str(out), "--figure", str(again)) == 0
    assert "<svg" in again.read_text()


@pytest.mark.usefixtures("no_evaluation_is_timed")
def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def solve_one(*arguments: object, **options: object) -> object:
        if solved:
            raise KeyboardInterrupt
        solved.append(True)
        return solve(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "solve", solve_one)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "--instances", str(tmp_path / "instances.json"), "--json", str(out))
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["tiny"]


@pytest.mark.usefixtures("no_evaluation_is_timed")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "nothing to solve"),
        (["--from-json", "{file}"], "give --figure FILE too"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--instances", "{file}", "--only", "exp1"], "has no instance 'exp1': it has tiny, other"),
    ],
)
def test_refuses(tmp_path: Path, options: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _run(tmp_path, *(option.format(file=tmp_path / "instances.json") for option in options))


@pytest.mark.parametrize("seed", range(6))
def test_uneven_problems_can_be_solved_one_model_after_the_other(seed: int) -> None:
    problem = heterogeneous(seed)
    assert heterogeneous(seed) == problem
    check(serial(problem))
    assert len(problem.pipelines) in (2, 3, 4)
    assert evaluate(serial(problem)).makespan > 0

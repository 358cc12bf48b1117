"""`fuse show`: what it prints and writes of each kind of file, and the one line it answers bad input with."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fuse.cli import main
from schedules import Problem, Schedule
from schedules.baselines import serial
from schedules.formats import problem_to_json, problem_to_text, schedule_to_json, schedule_to_text
from schedules.fused.solve import solution_to_json, solve
from schedules.instances import actor_and_critic

TRACE = Path(__file__).parents[1] / "golden" / "traces" / "iteration-00002.json"


@pytest.fixture
def problem() -> Problem:
    return actor_and_critic(
        actor_stages=2,
        critic_stages=2,
        actor_microbatches=2,
        critic_microbatches=2,
        actor_forward=2,
        critic_forward=1,
        actor_activation=2,
        critic_activation=1,
    ).problem


def show(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["show", str(path), *options]) == 0
    printed = capsys.readouterr().out
    long = [line for line in printed.splitlines() if len(line) > 80 and not line.startswith("wrote ")]
    assert not long
    return printed


def test_a_problem_in_both_forms(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "problem"
    for text in (problem_to_text(problem), json.dumps(problem_to_json(problem))):
        path.write_text(text)
        printed = show(path, capsys)
        assert "│ critic │ 1 0 " in printed
        assert "fuse solve finds better ones" in printed
        assert "A actor, B critic" in printed


def test_a_schedule_in_both_forms(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, schedule = tmp_path / "schedule", serial(problem)
    for text in (schedule_to_text(schedule), json.dumps(schedule_to_json(schedule))):
        path.write_text(text)
        printed = show(path, capsys)
        assert "   0 AAAA....aaaa..aaaaBbbBbb..  69.2%" in printed
        assert "│ makespan    │ 26 ticks │ 18    │" in printed
        assert "critical path: actor 18 ticks, critic 8 ticks" in printed


def test_a_solution(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "solution.json"
    path.write_text(json.dumps(solution_to_json(solve(problem, time_limit_s=120, num_workers=1))))
    printed = show(path, capsys)
    assert "solution: optimal, found by" in printed
    assert "│ makespan    │ 18 ticks │ 18    │" in printed


def test_a_trace_over_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = show(TRACE, capsys)
    assert "training, step 1 of 2" in printed
    assert "│ makespan │ 25.145 ms │ 35.326 ms │" in printed
    assert printed.index("\nplanned\n") < printed.index("\nexecuted\n")
    assert "│ device1 │ 0.0203   │ 0.00424 │" in printed
    assert "step 2 of 2" in show(TRACE, capsys, "--step", "2")


def test_writes_every_form(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (tmp_path / "problem.json", TRACE):
        if source is not TRACE:
            source.write_text(json.dumps(problem_to_json(problem)))
        outs = {name: tmp_path / f"out.{name}" for name in ("html", "svg", "chrome", "csv")}
        show(source, capsys, *(f"--{name}={path}" for name, path in outs.items()))
        assert outs["html"].read_text().startswith("<!doctype html>")
        assert "</svg>" in outs["svg"].read_text()
        events = json.loads(outs["chrome"].read_text())["traceEvents"]
        last = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
        assert last == pytest.approx(35326 if source is TRACE else 20000, rel=0.15)
        assert outs["csv"].read_text().startswith("0F0,")


def test_a_trace_without_training_is_only_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [event for event in json.loads(TRACE.read_text())["traceEvents"] if event.get("cat") != "train"]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert "generate" in show(path, capsys)
    assert main(["show", str(path), "--html", str(tmp_path / "out.html")]) == 2
    assert "holds no training step, so there is no --html of it" in capsys.readouterr().err


def test_wide_problems_fit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instance = actor_and_critic(
        actor_stages=16,
        critic_stages=4,
        actor_microbatches=16,
        critic_microbatches=4,
        actor_forward=200,
        critic_forward=90,
        actor_activation=123456789,
        critic_activation=98765432,
        split_backward=True,
    )
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(problem_to_json(instance.problem)))
    assert "critic3" in show(path, capsys)


ODD_NAME = "[red]x[/red] [/] <script>\x1b[31m'\"]]>$x^$"


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of devices and categories in a trace, of parts in a solution: no markup, nothing that a terminal obeys."""
    value = json.loads(TRACE.read_text())
    for event in value["traceEvents"]:
        if event["name"] == "process_name" and event["pid"] == 0:
            event["args"]["name"] = ODD_NAME
        elif event.get("cat") == "generate":
            event["cat"] = "[/]"
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(value))
    assert main(["show", str(path)]) == 0
    printed = capsys.readouterr().out
    joined = "".join(printed.split())
    assert "[red]x[/red]" in joined
    assert "\\x1b[31m" in joined
    assert "[/]" in joined
    assert "\x1b" not in printed


def test_titles_are_text_in_pages_and_pictures(tmp_path: Path, problem: Problem) -> None:
    path = tmp_path / "$x^$ ]]> & '<b>' \x1b.json"
    path.write_text(TRACE.read_text())
    outs = {name: tmp_path / f"out.{name}" for name in ("html", "svg")}
    assert main(["show", str(path), *(f"--{name}={out}" for name, out in outs.items())]) == 0
    words = ["".join(node.itertext()) for node in ElementTree.parse(outs["svg"]).getroot().iter()]
    assert any(word.startswith(r"$x^$ ]]> & '<b>' \x1b, step 1") for word in words)
    assert r"<title>$x^$ ]]&gt; &amp; &#x27;&lt;b&gt;&#x27; \x1b</title>" in outs["html"].read_text()
    assert "'<b>' " not in outs["html"].read_text()


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        (b"\xff\xfe\x00", [], "is not text"),
        (b"", [], "is neither JSON"),
        (b"schedule 1\nnum_ranks x\n", [], "line 2: expected integers, found 'x'"),
        (b"{", [], "is neither JSON"),
        (b"[1]", [], "is JSON, but none of a problem, a schedule"),
        (b'{"a": 1}', [], "is JSON, but none of a problem, a schedule"),
        (b'{"problem": 7}', [], "format version is 7"),
        (b'{"schedule": {}}', [], "format version is None"),
        (b'{"traceEvents": [{"ph": "X", "pid": 0}]}', [], "an event's dur is None, not a number"),
        (b'{"traceEvents": 3}', [], "expected an object with a list traceEvents"),
        (TRACE.read_bytes(), ["--step", "3"], "--step is 3, but"),
    ],
)
def test_bad_input_is_one_line(
    content: bytes, options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert main(["show", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_an_illegal_schedule_is_one_line(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule"
    path.write_text(schedule_to_text(Schedule(problem, ((), ()))))
    assert main(["show", str(path)]) == 2
    error = capsys.readouterr().err
    assert "illegal schedule: rank 0, F0.0.0: missing" in error
    assert error.count("\n") == 1


def test_an_absent_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "absent")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_a_missing_library_is_one_line(
    problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "problem"
    path.write_text(problem_to_text(problem))
    for package, option in (("plotly", "--html"), ("matplotlib", "--svg")):
        with monkeypatch.context() as patched:
            patched.setattr("schedules.export.extras.find_spec", lambda name, gone=package: None if name == gone else 1)
            assert main(["show", str(path), option, str(tmp_path / "out")]) == 2
        assert f"{package} is not installed, and this needs it: pip install 'fuse-rlhf[viz]'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
